"""Coordinate descent over codes: each column moved to the best grid value given all the others.

    R = (Ŵ − W)H;   ŵ_j ← nearest grid value of ŵ_j − R_j / H_jj

(CDQuant, Nair 2024, section 3; QuantEase, Behdin 2023, section 3.) The objective tr(E H Eᵀ) is a parabola in each
weight, so the nearest grid value to its vertex is the best one and no step raises it. All rows move at once: rows do
not meet in the objective.
"""

from __future__ import annotations

import torch
from torch import Tensor

from awqkit.kernels.column_block import descend_block
from awqkit.numerics.gptq import COLUMN_BLOCK
from awqkit.numerics.grid import QuantizedWeight, dequantize
from awqkit.numerics.rounding_metric import RoundingMetric

_COLUMNS_AT_ONCE = 16 * COLUMN_BLOCK  # whose rows of H are put in order together


def descend(weight: Tensor, quantized: QuantizedWeight, metric: RoundingMetric) -> QuantizedWeight:
    """Codes after one sweep over all columns in the metric's order, the grid held. weight: float32 `[out, in]`."""
    grid, order = quantized.grid, metric.order
    group, top = order // grid.group_size, float(2**grid.bits - 1)
    group_scale, group_zero = grid.group_scale.t(), grid.group_zero.t()
    chosen = quantized.codes.t()[order]
    residual = metric.pushed(dequantize(quantized.codes, grid) - weight).t()[order]
    for first in range(0, len(order), _COLUMNS_AT_ONCE):
        moment = metric.ordered_refinement_rows(slice(first, first + _COLUMNS_AT_ONCE))
        for start in range(first, first + len(moment), COLUMN_BLOCK):
            block = slice(start, start + COLUMN_BLOCK)
            rows = moment[start - first : start - first + COLUMN_BLOCK]
            scale, zero = group_scale[group[block]], group_zero[group[block]]
            steps, changes = descend_block(
                chosen[block].to(torch.float32).sub_(zero), residual[block], scale, -zero, top - zero, rows[:, block]
            )
            chosen[block] = steps.add_(zero).to(torch.uint8)
            residual.addmm_(rows.t(), changes)
    codes = torch.empty_like(quantized.codes)
    codes[:, order] = chosen.t()
    return QuantizedWeight(codes, grid)
