"""Coordinate descent over codes: each column moved to the best grid value given all the others.

    R = (Ŵ − W)(H + λ);   ŵ_j ← nearest grid value of ŵ_j − R_j / (H + λ)_jj

(CDQuant, Nair 2024, section 3; QuantEase, Behdin 2023, section 3.) The objective tr(E (H + λ) Eᵀ) is a parabola in each
weight, so the nearest grid value to its vertex is the best one and no step raises it. All rows move at once: rows do not
meet in the objective.
"""

from __future__ import annotations

import torch
from torch import Tensor

from awqkit.numerics.gptq import COLUMN_BLOCK
from awqkit.numerics.grid import QuantizedWeight, dequantize
from awqkit.numerics.rounding_metric import RoundingMetric


def descend(weight: Tensor, quantized: QuantizedWeight, metric: RoundingMetric, sweeps: int = 1) -> QuantizedWeight:
    """Codes after `sweeps` sweeps over all columns in the metric's order, the grid held. weight: float32 `[out, in]`."""
    grid, order = quantized.grid, metric.order
    group = order // grid.group_size
    scale, zero = grid.group_scale.t()[group], grid.group_zero.t()[group]
    lowest, highest = -zero, float(2**grid.bits - 1) - zero
    moment = metric.damped[order][:, order]
    steps = quantized.codes.t()[order].to(torch.float32).sub_(zero)
    residual = moment @ (dequantize(quantized.codes, grid) - weight).t()[order]
    curvature = moment.diagonal().tolist()
    for _ in range(sweeps):
        moved = False
        for start in range(0, len(curvature), COLUMN_BLOCK):
            end = min(start + COLUMN_BLOCK, len(curvature))
            # within the block R is kept up to date on a copy; the rest follows in one product
            local, changes = residual[start:end].clone(), torch.empty_like(residual[start:end])
            for j in range(start, end):
                step, row = steps[j], local[j - start]
                vertex = torch.addcdiv(step, row, scale[j], value=-1.0 / curvature[j]).round_()
                torch.minimum(torch.maximum(vertex, lowest[j], out=vertex), highest[j], out=vertex)
                change = torch.sub(vertex, step, out=changes[j - start]).mul_(scale[j])
                step.copy_(vertex)
                if j + 1 < end:
                    local[j - start + 1 :].addr_(moment[j, j + 1 : end], change)
            if bool(changes.any()):
                moved = True
                residual.addmm_(moment[:, start:end], changes)
        if not moved:
            break
    codes = torch.empty_like(quantized.codes)
    codes[:, order] = steps.add_(zero).to(torch.uint8).t()
    return QuantizedWeight(codes, grid)
