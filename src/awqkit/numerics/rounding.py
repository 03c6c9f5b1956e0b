"""From a weight and a range to codes: the last step of every method."""

from __future__ import annotations

import torch
from torch import Tensor

from awqkit.numerics.grid import (
    Grid,
    QuantizedWeight,
    choose_scale_and_zero,
    group_range,
    nearest_codes,
)


def span_grid(
    weight: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    stored_dtype: torch.dtype,
    ratio_low: Tensor | None = None,
    ratio_high: Tensor | None = None,
) -> Grid:
    """The grid over each group's range, the ends shrunk by the ratios if given.

    weight: float32 `[out, in]`; ratios: `[groups, out]` as `search_clip` returns them, None for the whole range.
    """
    low, high = group_range(weight.reshape(len(weight), -1, group_size))
    if ratio_low is not None and ratio_high is not None:
        low, high = low * ratio_low.t().contiguous(), high * ratio_high.t().contiguous()
    group_scale, group_zero = choose_scale_and_zero(
        low, high, bits=bits, symmetric=symmetric, stored_dtype=stored_dtype
    )
    return Grid(bits, group_size, symmetric, group_scale, group_zero)


def round_nearest(weight: Tensor, grid: Grid) -> QuantizedWeight:
    """Nearest rounding (RTN): each weight to the closest value of its group's grid. weight: float32 `[out, in]`."""
    return QuantizedWeight(nearest_codes(weight, grid), grid)
