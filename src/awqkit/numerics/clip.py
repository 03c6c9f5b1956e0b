"""Clip search: which part of a group's range is worth keeping.

Shrinking the range makes the step Δ smaller for most weights and costs the few at the ends. AWQ searches one ratio
for both ends (Lin 2023, code; one-sided in its words "max value"); on an asymmetric grid the two ends are worth
different amounts, so here each end may have its own. The judge is the group's own block of H, or a weight for each
column's squared error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from awqkit.kernels.group_search import clip_ratios, takes
from awqkit.kernels.replay import constants
from awqkit.numerics.grid_tries import TileGrid, spanned, tile_error_, tile_range, tile_row_errors_
from awqkit.numerics.tiles import group_tiles

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
    group_weights: as `grid_tries.tile_row_errors_` takes them, for the same (scaled) input.
    separate_ends: search one shared ratio, then the high end alone, then the low end alone; ignored when symmetric.
    A ratio is only taken where it lowers the group's own error, so no group gets worse by its own weights.
    """
    if takes(grouped, grouped.shape[-1], stored_dtype):
        return clip_ratios(
            grouped, group_weights, RATIOS,
            bits=bits, symmetric=symmetric, stored_dtype=stored_dtype, separate_ends=separate_ends,
        )  # fmt: skip
    groups, rows, group_size = grouped.shape
    ratios_low = torch.ones(groups, rows, device=grouped.device)
    ratios_high = torch.ones_like(ratios_low)
    span = partial(spanned, bits=bits, symmetric=symmetric, stored_dtype=stored_dtype)
    for tile in group_tiles(groups, group_size, rows, grouped.device):
        search = _EndSearch(grouped[tile].transpose(1, 2).contiguous(), group_weights[tile[0]], span)
        search.sweep(move_low=True, move_high=True)
        if separate_ends and not symmetric:
            search.sweep(move_low=False, move_high=True)
            search.sweep(move_low=True, move_high=False)
        ratios_low[tile], ratios_high[tile] = search.ratio_low, search.ratio_high
    return ratios_low, ratios_high


class _EndSearch:
    """One tile `[groups, group_size, rows]` with the best ratios found so far, `[groups, rows]`."""

    def __init__(self, tile: Tensor, group_weights: Tensor, span: Callable[[Tensor, Tensor], list[TileGrid]]) -> None:
        self._tile, self._group_weights, self._span = tile, group_weights, span
        self._error, self._spare = torch.empty_like(tile), torch.empty_like(tile)
        self._low, self._high = tile_range(tile)
        self.ratio_low, self.ratio_high = torch.ones_like(self._low), torch.ones_like(self._high)
        self._best = self._errors(self._low.unsqueeze(0), self._high.unsqueeze(0))[0]

    def sweep(self, *, move_low: bool, move_high: bool) -> None:
        """Try 20 ratios below 1 for the chosen ends, the other end held; keep what is better."""
        ratios = constants(RATIOS, self._low.device).reshape(-1, 1, 1)
        low = self._low * (ratios if move_low else self.ratio_low.expand(NUM_STEPS, -1, -1))
        high = self._high * (ratios if move_high else self.ratio_high.expand(NUM_STEPS, -1, -1))
        error, index = self._errors(low, high).min(dim=0)
        better = error < self._best
        self._best = torch.where(better, error, self._best)
        picked = ratios.flatten()[index]
        if move_low:
            self.ratio_low = torch.where(better, picked, self.ratio_low)
        if move_high:
            self.ratio_high = torch.where(better, picked, self.ratio_high)

    def _errors(self, low: Tensor, high: Tensor) -> Tensor:
        """The error under some ranges `[tries, groups, rows]`, same shape."""
        found = torch.empty_like(low)
        for grid, errors in zip(self._span(low, high), found, strict=True):
            tile_row_errors_(tile_error_(self._tile, grid, self._error), self._group_weights, self._spare, errors)
        return found
