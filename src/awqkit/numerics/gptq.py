"""GPTQ rounding: column after column, each column's error absorbed by the columns that are still free.

    for j in order:   ŵ_j = nearest grid value of w_j;   e = (w_j − ŵ_j) / U_jj;   w_k −= e · U_jk  for the later k

(Frantar 2022, Algorithm 1.) The grid of every group is fixed beforehand, so that any column order is possible without
a `g_idx` in the file; within lazy blocks of 128 columns updates are applied at once, outside after the block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from awqkit.kernels.column_block import round_block
from awqkit.numerics.grid import Grid, QuantizedWeight
from awqkit.numerics.rounding_metric import RoundingMetric

COLUMN_BLOCK = 128  # lazy updates: Frantar 2022, section 3.3, step 2


def round_gptq(weight: Tensor, grid: Grid, metric: RoundingMetric) -> QuantizedWeight:
    """Codes on `grid` that nearly minimise tr(E (H + λ) Eᵀ). weight: float32 `[out, in]`."""
    order = metric.order
    # transposed: a column is then one contiguous row, which is what every step reads and writes
    remaining = weight.t()[order]
    group, top = order // grid.group_size, float(2**grid.bits - 1)
    group_scale, group_zero = grid.group_scale.t(), grid.group_zero.t()
    chosen = torch.empty_like(remaining, dtype=torch.uint8)
    for start in range(0, len(order), COLUMN_BLOCK):
        block = slice(start, start + COLUMN_BLOCK)
        later = slice(start + COLUMN_BLOCK, None)
        scale, zero = group_scale[group[block]], group_zero[group[block]]
        factor = metric.rounding_factor(block)
        steps, errors = round_block(remaining[block], scale, -zero, top - zero, factor[:, block])
        chosen[block] = steps.add_(zero).to(torch.uint8)
        remaining[later].addmm_(factor[:, later].t(), errors, alpha=-1.0)
    codes = torch.empty_like(weight, dtype=torch.uint8)
    codes[:, order] = chosen.t()
    return QuantizedWeight(codes, grid)
