"""The one objective: how far the output of a linear moves when its weight changes by E = Ŵ − W.

    Σ_i r_i (E H Eᵀ)_ii      H = E[x xᵀ], r_i the weight of output row i (1 where rows count alike)

With r = 1 it is the mean over tokens of ‖E x‖². Every search of this package minimises it, on the full H or on H's
diagonal blocks of one group each, which drops the correlations between groups. `moment` is either of them:
`[in, in]`, or `[groups, group_size, group_size]` where nobody asks for more than the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from awqkit.numerics.grid import merge_groups, split_groups


def diagonal_blocks(moment: Tensor, group_size: int) -> Tensor:
    """The blocks of H on its diagonal, `[groups, group_size, group_size]`, contiguous."""
    if moment.dim() == 3:
        return moment
    groups = moment.shape[0] // group_size
    tiles = moment.reshape(groups, group_size, groups, group_size)
    return tiles.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def moment_diagonal(moment: Tensor) -> Tensor:
    """H_jj, `[in]`."""
    return moment.diagonal(dim1=-2, dim2=-1).reshape(-1)


def moment_divided(moment: Tensor, channel_scale: Tensor) -> Tensor:
    """The moment of x / s: H_jk / (s_j s_k); channel_scale: s `[in]`."""
    scale = channel_scale.reshape(moment.shape[:-1]) if moment.dim() == 3 else channel_scale
    return moment / scale.unsqueeze(-2) / scale.unsqueeze(-1)


def moment_among(moment: Tensor, channels: Tensor) -> Tensor:
    """H_jk of some channels, `[k, k]`, 0 between groups where only the blocks are there; channels: `[k]` int64."""
    if moment.dim() == 2:
        return moment[channels][:, channels]
    group, place = channels // moment.shape[-1], channels % moment.shape[-1]
    together = group.unsqueeze(1) == group
    return moment[group.unsqueeze(1), place.unsqueeze(1), place] * together


def pushed(error: Tensor, moment: Tensor) -> Tensor:
    """E H, `[out, in]` float32; error `[out, in]`."""
    if moment.dim() == 2:
        return error @ moment
    return merge_groups(torch.matmul(split_groups(error, moment.shape[-1]), moment))


def row_errors(error: Tensor, moment: Tensor) -> Tensor:
    """(E H Eᵀ)_ii for every row, `[out]`; error `[out, in]` float32."""
    return (pushed(error, moment) * error).sum(dim=-1).clamp_(min=0.0)


def summed_error(error: Tensor, moment: Tensor, row_weight: Tensor | None = None) -> Tensor:
    """Σ_i r_i (E H Eᵀ)_ii, or tr(G E H Eᵀ), a tensor of one number: several are read at once.

    row_weight: r `[out]`, G `[out, out]`, or None: all ones.
    """
    return summed_errors(error, moment, [row_weight])[0]


def summed_errors(error: Tensor, moment: Tensor, row_weights: Sequence[Tensor | None]) -> list[Tensor]:
    """`summed_error` by each of several weights of the rows, the rows' own errors computed once."""
    found, rows = [], None
    for weight in row_weights:
        if weight is not None and weight.dim() == 2:
            found.append((weight * (error @ moment @ error.t())).sum().clamp_(min=0.0))
            continue
        rows = row_errors(error, moment) if rows is None else rows
        found.append(rows.sum() if weight is None else (rows * weight).sum())
    return found


def weighted_error(error: Tensor, moment: Tensor, row_weight: Tensor | None = None) -> float:
    """`summed_error` as a number."""
    return float(summed_error(error, moment, row_weight))
