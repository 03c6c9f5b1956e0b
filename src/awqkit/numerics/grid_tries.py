"""One tile of a weight under one grid after another: the inner loop of the searches, in as few passes as it can.

A tile is `[groups, group_size, rows]`, rows last: what belongs to a row then lies along the vector registers, so a
range, a bound or a step for every row costs no more than a number. Codes are those of `grid.nearest_codes`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from awqkit.numerics.grid import choose_scale_and_zero


@dataclass(frozen=True, slots=True)
class TileGrid:
    """A grid to try on a tile, all `[groups, 1, rows]` float32.

    lowest, highest: the steps Δ that the codes 0 and 2^bits − 1 are away from 0.
    """

    group_scale: Tensor
    lowest: Tensor
    highest: Tensor


def tile_of(weight: Tensor, group_size: int, groups: slice, rows: slice) -> Tensor:
    """A tile of `[out, in]`, contiguous."""
    columns = slice(groups.start * group_size, groups.stop * group_size)
    return weight[rows, columns].t().reshape(groups.stop - groups.start, group_size, -1).contiguous()


def tile_range(tile: Tensor) -> tuple[Tensor, Tensor]:
    """As `grid.group_range`: `[groups, rows]` each."""
    return tile.amin(dim=1).clamp_(max=0.0), tile.amax(dim=1).clamp_(min=0.0)


def spanned(low: Tensor, high: Tensor, *, bits: int, symmetric: bool, stored_dtype: torch.dtype) -> list[TileGrid]:
    """The grids that span the ranges `[tries, groups, rows]`, made together: each is a dozen operators."""
    group_scale, group_zero = choose_scale_and_zero(
        low, high, bits=bits, symmetric=symmetric, stored_dtype=stored_dtype
    )
    lowest = group_zero.neg_().unsqueeze(2)
    fields = (group_scale.unsqueeze(2), lowest, lowest + float(2**bits - 1))
    return [TileGrid(*each) for each in zip(*(field.unbind() for field in fields), strict=True)]


def tile_error_(tile: Tensor, grid: TileGrid, out: Tensor) -> Tensor:
    """W − Ŵ for the nearest value of the grid, in `out`, which is not the tile."""
    torch.div(tile, grid.group_scale, out=out).round_()
    torch.clamp(out, grid.lowest, grid.highest, out=out)
    return torch.addcmul(tile, out, grid.group_scale, value=-1.0, out=out)


def tile_row_errors_(error: Tensor, group_weights: Tensor, spare: Tensor, out: Tensor) -> Tensor:
    """e_g H_gg e_gᵀ for every group and row, `[groups, rows]` in `out`.

    group_weights: `[groups, group_size, group_size]`, H's blocks, or `[groups, group_size]`, a weight for each column's
    square (the conditional variance, say). `error`, a tile, and `spare`, of its shape, are used up.
    """
    if group_weights.dim() == 2:
        return torch.bmm(group_weights.unsqueeze(1), error.square_(), out=out.unsqueeze(1))
    return torch.sum(torch.bmm(group_weights, error, out=spare).mul_(error), dim=1, out=out)
