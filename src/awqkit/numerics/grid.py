"""The grid of integer codes that a low-bit weight lives on, and the three verbs around it.

    w ≈ (q − z) · Δ        q is `codes`, z is `group_zero`, Δ is `group_scale`, all unsigned codes in 0 .. 2^bits − 1

One (Δ, z) serves `group_size` neighbouring input channels of one output row. Δ is rounded to the dtype that the
checkpoint stores *before* any code is chosen, because readers cast it (formats: "scale dtype = model dtype").
Knows nothing of files, names or models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the codes of one `[out, in]` weight lie.

    group_scale: `[out, groups]` float32, > 0, units of the weight, each value exact in the stored dtype.
    group_zero: `[out, groups]` float32 whole numbers in 0 .. 2^bits − 1.
    symmetric: every group_zero is 2^(bits − 1).
    """

    bits: int
    group_size: int
    symmetric: bool
    group_scale: Tensor
    group_zero: Tensor


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """`codes` `[out, in]` uint8 on a `grid`; `dequantize(codes, grid)` is the weight that a reader computes with."""

    codes: Tensor
    grid: Grid

    def rows(self, part: slice) -> QuantizedWeight:
        """Some of its rows, as a weight of their own."""
        grid = replace(self.grid, group_scale=self.grid.group_scale[part], group_zero=self.grid.group_zero[part])
        return QuantizedWeight(self.codes[part], grid)


def split_groups(weight: Tensor, group_size: int) -> Tensor:
    """`[out, in]` as `[groups, out, group_size]`, contiguous: a batch entry per group, for products with H's blocks."""
    rows, columns = weight.shape
    return weight.reshape(rows, columns // group_size, group_size).transpose(0, 1).contiguous()


def merge_groups(grouped: Tensor) -> Tensor:
    """The inverse of `split_groups`: `[groups, out, group_size]` as `[out, in]`."""
    groups, rows, group_size = grouped.shape
    return grouped.transpose(0, 1).reshape(rows, groups * group_size)


def group_range(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of every group, widened to contain 0.

    grouped: `[..., group_size]`. Returns `low` ≤ 0 and `high` ≥ 0, `[...]`. Containing 0 keeps a group of weights
    that all lie in [1, 2], say, from a zero point outside the code range, which would collapse it to a constant.
    """
    # two passes: aminmax over the last dimension is eight times slower than amin and amax on a CPU
    return grouped.amin(dim=-1).clamp_(max=0.0), grouped.amax(dim=-1).clamp_(min=0.0)


def choose_scale_and_zero(
    low: Tensor, high: Tensor, *, bits: int, symmetric: bool, stored_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Δ and z that span [low, high], Δ exact in `stored_dtype`.

    low, high: any shape, float32, low ≤ 0 ≤ high. Returns `group_scale` and `group_zero`, same shape, float32.
    A group that is all zero, or whose Δ underflows in `stored_dtype`, gets Δ = 1.
    """
    top = float(2**bits - 1)
    span = 2.0 * torch.maximum(-low, high) if symmetric else high - low
    largest = torch.finfo(stored_dtype).max
    group_scale = (span / top).clamp_(max=largest).to(stored_dtype).to(torch.float32)
    group_scale = torch.where(group_scale > 0, group_scale, torch.ones_like(group_scale))
    if symmetric:
        return group_scale, torch.full_like(group_scale, float(2 ** (bits - 1)))
    return group_scale, (-low / group_scale).round_().clamp_(0.0, top)


def nearest_codes(weight: Tensor, grid: Grid) -> Tensor:
    """Codes `[out, in]` uint8 of the grid values nearest to `weight` `[out, in]` float32 (round half to even)."""
    rows, columns = weight.shape
    grouped = weight.reshape(rows, columns // grid.group_size, grid.group_size)
    codes = (grouped / grid.group_scale.unsqueeze(-1)).round_().add_(grid.group_zero.unsqueeze(-1))
    return codes.clamp_(0.0, float(2**grid.bits - 1)).to(torch.uint8).reshape(rows, columns)


def dequantize(codes: Tensor, grid: Grid) -> Tensor:
    """The float32 weight `[out, in]` that `codes` `[out, in]` mean: (q − z) · Δ, exactly as readers compute it."""
    rows, columns = codes.shape
    grouped = codes.reshape(rows, columns // grid.group_size, grid.group_size).to(torch.float32)
    return (grouped - grid.group_zero.unsqueeze(-1)).mul_(grid.group_scale.unsqueeze(-1)).reshape(rows, columns)
