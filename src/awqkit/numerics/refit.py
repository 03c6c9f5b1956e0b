"""Refit of a grid to the codes that were chosen on it: least squares on the group scales of each row, then zero points.

    R = (Ŵ − W)H,   p_g = q − z of one row's group g,   M_gk = p_g H_gk p_kᵀ,   b_g = p_g · R_g
    Δ ← Δ − M⁻¹ b                            all groups of the row together, then rounded to the stored dtype
    z_g ← z_g + round((1 · R_g) / (Δ_g · 1 H_gg 1ᵀ))   all weights of the group move by Δ; only where z is free

Scales of up to 32 groups are solved for at once, further ones after them. A row takes its new scales only where
tr(E H Eᵀ) falls with the values as they will be stored; of the zero points the one that helps a row most moves first.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from awqkit.kernels.precision import full_precision
from awqkit.kernels.replay import may_look
from awqkit.numerics.grid import QuantizedWeight, dequantize
from awqkit.numerics.rounding_metric import RoundingMetric
from awqkit.numerics.tiles import products_at_once

GROUPS_AT_ONCE = 32  # M has this many squared entries a row
_RIDGE = 1e-5  # of M's diagonal: groups whose steps are nearly parallel under H


def refit(
    weight: Tensor, quantized: QuantizedWeight, metric: RoundingMetric, stored_dtype: torch.dtype
) -> QuantizedWeight:
    """The same codes on a grid whose Δ (and z, if asymmetric) fit them better. weight: float32 `[out, in]`."""
    grid = quantized.grid
    rows, groups = grid.group_scale.shape
    steps = quantized.codes.to(torch.float32).reshape(rows, groups, -1) - grid.group_zero.unsqueeze(-1)
    residual = metric.pushed(dequantize(quantized.codes, grid) - weight)
    group_scale = grid.group_scale.clone()
    for start in range(0, groups, GROUPS_AT_ONCE):
        some = slice(start, start + GROUPS_AT_ONCE)
        columns = slice(start * grid.group_size, (start + GROUPS_AT_ONCE) * grid.group_size)
        block, pull = metric.refinement_block(columns), residual[:, columns].reshape(steps[:, some].shape)
        change = _scale_changes(steps[:, some], pull, block, group_scale[:, some], stored_dtype)
        group_scale[:, some] += change
        residual += metric.pushed((steps[:, some] * change.unsqueeze(-1)).reshape(rows, -1), columns)
    group_zero = grid.group_zero
    if not grid.symmetric:
        pull = residual.reshape(rows, groups, -1).sum(dim=-1)
        group_zero = _shifted_zeros(
            group_zero, group_scale, pull, metric.refinement_sums(groups), float(2**grid.bits - 1)
        )
    return QuantizedWeight(quantized.codes, replace(grid, group_scale=group_scale, group_zero=group_zero))


def _scale_changes(
    steps: Tensor, pull: Tensor, moment: Tensor, group_scale: Tensor, stored_dtype: torch.dtype
) -> Tensor:
    """What to add to Δ `[out, groups]`; 0 for rows that would not gain. steps, pull: `[out, groups, group_size]`."""
    slope = (steps * pull).sum(dim=-1)
    curvature = _curvature(steps, moment)
    diagonal = curvature.diagonal(dim1=1, dim2=2)
    # a group of zeros has no vertex: its own equation becomes "no change"
    ridge = torch.where(diagonal > 0, _RIDGE * diagonal, torch.ones_like(diagonal))
    factor, failed = torch.linalg.cholesky_ex(curvature + torch.diag_embed(ridge))
    halfway = torch.linalg.solve_triangular(factor, slope.unsqueeze(-1), upper=False)
    vertex = group_scale - torch.linalg.solve_triangular(factor.mT, halfway, upper=True).squeeze(-1)
    stored = vertex.to(stored_dtype).to(torch.float32)
    # a Δ of another sign or size is no refit: codes and zero point would no longer mean the same range
    sound = (stored > 0.25 * group_scale) & (stored < 4.0 * group_scale) & (failed == 0).unsqueeze(-1)
    change = torch.where(sound, stored - group_scale, torch.zeros_like(stored))
    gain = (change * (2.0 * slope + torch.bmm(curvature, change.unsqueeze(-1)).squeeze(-1))).sum(dim=-1)
    return torch.where((gain < 0).unsqueeze(-1), change, torch.zeros_like(change))


def _curvature(steps: Tensor, moment: Tensor) -> Tensor:
    """M of every row, `[out, groups, groups]`: the products of the groups' steps under H."""
    groups, at_once = steps.shape[1], products_at_once(steps)
    left, right = steps.transpose(0, 1), moment.reshape(groups, -1, moment.shape[1])
    products = [
        (left[some] @ right[some]).reshape(-1, *steps.shape).mul_(steps).sum(dim=-1)
        for some in (slice(start, start + at_once) for start in range(0, groups, at_once))
    ]
    return torch.cat(products).transpose(0, 1).contiguous()


def _shifted_zeros(group_zero: Tensor, group_scale: Tensor, pull: Tensor, sums: Tensor, top: float) -> Tensor:
    """Zero points `[out, groups]` after each row's best single move, repeated until no row gains.

    pull: 1 · R_g, `[out, groups]`; sums: 1 H_gk 1ᵀ, `[groups, groups]`. All weights of a group move alike, so nothing
    of the size of the weight is looked at.
    """
    groups = torch.arange(sums.shape[0], device=sums.device)
    weight_of_group = sums.diagonal().clamp(min=torch.finfo(torch.float32).tiny)
    for _ in range(sums.shape[0]):
        shift = (pull / (group_scale * weight_of_group)).round_()
        shift = torch.minimum(torch.maximum(shift, -group_zero), top - group_zero)
        move = shift * group_scale
        gain, best = (move * (move * weight_of_group - 2.0 * pull)).min(dim=1)
        if may_look() and not bool((gain < 0).any()):
            break
        chosen = (best.unsqueeze(-1) == groups) & (gain < 0).unsqueeze(-1)
        group_zero = group_zero + shift * chosen
        with full_precision():
            pull = pull - (move * chosen) @ sums
    return group_zero
