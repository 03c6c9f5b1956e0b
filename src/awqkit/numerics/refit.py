"""Refit of a grid to the codes that were chosen on it: least squares on each group's Δ, then on its zero point.

    R = (Ŵ − W)H,  p = q − z of one row and group,  h = its block of H
    Δ ← Δ − (p · R_g) / (p h pᵀ)            the vertex of a parabola, rounded to the stored dtype
    z ← z + round((1 · R_g) / (Δ · 1 h 1ᵀ))  all weights of the group move by Δ; only where the grid has zero points

Group after group, each seeing what the ones before it changed. A new value is taken only where tr(E H Eᵀ) falls
with the value as it will be stored.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from awqkit.numerics.grid import QuantizedWeight, dequantize
from awqkit.numerics.rounding_metric import RoundingMetric


def refit(
    weight: Tensor, quantized: QuantizedWeight, metric: RoundingMetric, stored_dtype: torch.dtype
) -> QuantizedWeight:
    """The same codes on a grid whose Δ (and z, if asymmetric) fit them better. weight: float32 `[out, in]`."""
    grid, moment = quantized.grid, metric.refinement_moment
    group_scale, group_zero = grid.group_scale.t().clone(), grid.group_zero.t().clone()
    codes = quantized.codes.t().to(torch.float32)
    residual = moment @ (dequantize(quantized.codes, grid) - weight).t()
    top = float(2**grid.bits - 1)
    for index in range(group_scale.shape[0]):
        inside = slice(index * grid.group_size, (index + 1) * grid.group_size)
        block, pull = moment[inside, inside], residual[inside]
        steps = codes[inside] - group_zero[index]
        change = _scale_change(steps, pull, block, group_scale[index], stored_dtype)
        group_scale[index] += change
        moved = steps * change
        if not grid.symmetric:
            pull = torch.addmm(pull, block, moved)
            shift = (pull.sum(dim=0) / (group_scale[index] * block.sum().clamp(min=1e-30))).round_()
            shift = torch.minimum(torch.maximum(shift, -group_zero[index]), top - group_zero[index])
            group_zero[index] += shift
            moved = moved - shift * group_scale[index]
        residual.addmm_(moment[:, inside], moved)
    return QuantizedWeight(
        quantized.codes,
        replace(grid, group_scale=group_scale.t().contiguous(), group_zero=group_zero.t().contiguous()),
    )


def _scale_change(steps: Tensor, pull: Tensor, block: Tensor, group_scale: Tensor, stored_dtype: torch.dtype) -> Tensor:
    """What to add to Δ, `[out]`: 0 where the rounded vertex does not lower the objective."""
    slope = (steps * pull).sum(dim=0)
    curvature = (steps * (block @ steps)).sum(dim=0)
    vertex = group_scale - slope / curvature.clamp(min=torch.finfo(torch.float32).tiny)
    change = vertex.to(stored_dtype).to(torch.float32) - group_scale
    gain = change * (2.0 * slope + change * curvature)
    # a Δ of another sign or size is no refit: codes and zero point would no longer mean the same range
    sound = (group_scale + change > 0.25 * group_scale) & (group_scale + change < 4.0 * group_scale)
    return torch.where(sound & (gain < 0), change, torch.zeros_like(change))
