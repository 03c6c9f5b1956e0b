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
from awqkit.numerics.gptq import COLUMN_BLOCK, ColumnGrids, column_chunks
from awqkit.numerics.grid import QuantizedWeight, dequantize
from awqkit.numerics.rounding_metric import RoundingMetric


def descend(weight: Tensor, quantized: QuantizedWeight, metric: RoundingMetric) -> QuantizedWeight:
    """Codes after one sweep over all columns in the metric's order, the grid held. weight: float32 `[out, in]`."""
    grid, order = quantized.grid, metric.order
    chosen = quantized.codes.t()[order]
    residual = metric.pushed(dequantize(quantized.codes, grid) - weight).t()[order]
    for chunk in column_chunks(len(order), len(weight)):
        grids, moment = ColumnGrids.of(grid, order[chunk]), metric.ordered_refinement_rows(chunk)
        steps = chosen[chunk].to(torch.float32).sub_(grids.zero)
        for start in range(0, len(steps), COLUMN_BLOCK):
            here = slice(start, start + COLUMN_BLOCK)
            block = slice(chunk.start + start, min(chunk.start + start + COLUMN_BLOCK, chunk.stop))
            steps[here], changes = descend_block(
                steps[here],
                residual[block],
                grids.scale[here],
                grids.lowest[here],
                grids.highest[here],
                moment[here, block],
            )
            residual.addmm_(moment[here].t(), changes)
        chosen[chunk] = steps.add_(grids.zero).to(torch.uint8)
    codes = torch.empty_like(quantized.codes)
    codes[:, order] = chosen.t()
    return QuantizedWeight(codes, grid)
