"""Clip search: which part of a group's range is worth keeping.

Shrinking the range makes the step Δ smaller for most weights and costs the few at the ends. AWQ searches one ratio
for both ends (Lin 2023, code; one-sided in its words "max value"); on an asymmetric grid the two ends are worth
different amounts, so here each end may have its own. The judge is the group's own block of H, or a weight for each
column's squared error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from awqkit.kernels.group_search import clip_ratios, takes
from awqkit.numerics.grid import choose_scale_and_zero, group_range, rounding_error
from awqkit.numerics.output_error import group_row_errors
from awqkit.numerics.tiles import row_tiles, tries_at_once

NUM_STEPS = 20
MIN_RATIO = 0.5
RATIOS = tuple(1.0 - (1.0 - MIN_RATIO) * step / NUM_STEPS for step in range(1, NUM_STEPS + 1))


def search_clip(
    grouped: Tensor,
    group_weights: Tensor,
    *,
    bits: int,
    symmetric: bool,
    stored_dtype: torch.dtype,
    separate_ends: bool,
) -> tuple[Tensor, Tensor]:
    """The shares of the low and the high end that are kept, per group and row, both `[groups, out]` in [0.5, 1].

    grouped: float32 `[groups, out, group_size]` weights as they will be rounded (s applied).
    group_weights: as `output_error.group_row_errors` takes them, for the same (scaled) input.
    separate_ends: search one shared ratio, then the high end alone, then the low end alone; ignored when symmetric.
    A ratio is only taken where it lowers the group's own error, so no group gets worse by its own weights.
    """
    if takes(grouped, grouped.shape[-1], stored_dtype):
        return clip_ratios(
            grouped, group_weights, RATIOS,
            bits=bits, symmetric=symmetric, stored_dtype=stored_dtype, separate_ends=separate_ends,
        )  # fmt: skip
    ratios_low = torch.ones(grouped.shape[:2], device=grouped.device)
    ratios_high = torch.ones_like(ratios_low)
    for tile in row_tiles(grouped.shape, grouped.device):
        weights = grouped[:, tile].contiguous()
        search = _EndSearch(weights, group_weights, bits, symmetric, stored_dtype)
        search.sweep(move_low=True, move_high=True)
        if separate_ends and not symmetric:
            search.sweep(move_low=False, move_high=True)
            search.sweep(move_low=True, move_high=False)
        ratios_low[:, tile], ratios_high[:, tile] = search.ratio_low, search.ratio_high
    return ratios_low, ratios_high


class _EndSearch:
    """One tile of rows with the best ratios found so far."""

    def __init__(
        self, weights: Tensor, group_weights: Tensor, bits: int, symmetric: bool, stored_dtype: torch.dtype
    ) -> None:
        self.weights, self.group_weights = weights, group_weights
        self.bits, self.symmetric, self.stored_dtype = bits, symmetric, stored_dtype
        self.low, self.high = group_range(weights)
        self.ratio_low, self.ratio_high = torch.ones_like(self.low), torch.ones_like(self.high)
        self.best = self._error(self.ratio_low.unsqueeze(0), self.ratio_high.unsqueeze(0))[0]

    def sweep(self, *, move_low: bool, move_high: bool) -> None:
        """Try 20 ratios below 1 for the chosen ends, the other end held; keep what is better."""
        start_low, start_high = self.ratio_low, self.ratio_high
        at_once = tries_at_once(self.weights)
        for start in range(0, NUM_STEPS, at_once):
            some = torch.tensor(RATIOS[start : start + at_once], device=start_low.device).reshape(-1, 1, 1)
            some = some.expand(-1, *start_low.shape)
            ratio_low = some if move_low else start_low.expand_as(some)
            ratio_high = some if move_high else start_high.expand_as(some)
            error, index = self._error(ratio_low, ratio_high).min(dim=0)
            better = error < self.best
            self.best = torch.where(better, error, self.best)
            pick = index.unsqueeze(0)
            self.ratio_low = torch.where(better, ratio_low.gather(0, pick)[0], self.ratio_low)
            self.ratio_high = torch.where(better, ratio_high.gather(0, pick)[0], self.ratio_high)

    def _error(self, ratio_low: Tensor, ratio_high: Tensor) -> Tensor:
        """The error under some pairs of ratios `[tries, groups, out]`, same shape."""
        group_scale, group_zero = choose_scale_and_zero(
            self.low * ratio_low,
            self.high * ratio_high,
            bits=self.bits,
            symmetric=self.symmetric,
            stored_dtype=self.stored_dtype,
        )
        return group_row_errors(rounding_error(self.weights, group_scale, group_zero, self.bits), self.group_weights)
