"""One linear: grid, clip and rounding, and the check that they did no harm."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from awqkit.decisions import LinearDecision
from awqkit.methods.plan import LinearPlan
from awqkit.methods.slots import CLIP, ROUNDING
from awqkit.numerics.grid import QuantizedWeight, dequantize, split_groups
from awqkit.numerics.output_error import diagonal_blocks, row_errors, weighted_error
from awqkit.numerics.rounding import round_nearest, span_grid


@dataclass(frozen=True, slots=True)
class ScaledWeight:
    """A linear on its way to the quantizer: `weight` = original · s / r, float32 `[out, in]`.

    channel_scale: s `[in]`, what the folds that it reads from multiplied its columns by.
    row_scale: r `[out]`, what the fold that it produces for divided its rows by.
    """

    original: Tensor
    channel_scale: Tensor
    row_scale: Tensor

    @classmethod
    def unscaled(cls, weight: Tensor) -> ScaledWeight:
        """The weight as the checkpoint has it."""
        rows, columns = weight.shape
        return cls(weight, torch.ones(columns, device=weight.device), torch.ones(rows, device=weight.device))

    @property
    def weight(self) -> Tensor:
        """What the quantizer gets, in float32: a stored group_scale could not be divided exactly afterwards."""
        return self.original * self.channel_scale / self.row_scale.unsqueeze(1)

    def restored(self, weight: Tensor) -> Tensor:
        """A weight in the quantizer's units back in the original's: what the linear computes in the folded model."""
        return weight / self.channel_scale * self.row_scale.unsqueeze(1)


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """The codes of one linear with the float32 weight that they mean in the original's units, and the Decision."""

    plan: LinearPlan
    quantized: QuantizedWeight
    restored: Tensor
    decision: LinearDecision


def round_plainly(weight: Tensor, plan: LinearPlan) -> QuantizedWeight:
    """Plain rounding (RTN) of float32 `[out, in]`: the whole range, the nearest code. The yardstick of everything."""
    return round_nearest(weight, span_grid(weight, group_size=plan.group_size, **plan.grid_choices))


def plain_weight(scaled: ScaledWeight, plan: LinearPlan) -> Tensor:
    """What plain rounding at s = 1 makes of the linear, float32 `[out, in]` in the original's units; r is kept."""
    unscaled = replace(scaled, channel_scale=torch.ones_like(scaled.channel_scale))
    plain = round_plainly(unscaled.weight, plan)
    return unscaled.restored(dequantize(plain.codes, plain.grid))


def quantize_linear(scaled: ScaledWeight, moment: Tensor | None, plan: LinearPlan) -> QuantizedLinear:
    """The quantized linear by the plan's clip and rounding, never worse than nearest rounding under the same s.

    moment: H `[in, in]` float32 of the *original* input, or None without calibration (then nothing is searched).
    """
    weight = scaled.weight
    nearest = round_plainly(weight, plan)
    if moment is None:
        return _decided(scaled, None, plan, nearest, 1.0, None)
    scaled_moment = moment / scaled.channel_scale.unsqueeze(0) / scaled.channel_scale.unsqueeze(1)
    clip = CLIP[plan.clip]
    if clip is None:
        chosen, clip_mean = ROUNDING[plan.rounding](weight, nearest.grid), 1.0
    else:
        grouped = split_groups(weight, plan.group_size)
        low, high = clip(grouped, diagonal_blocks(scaled_moment, plan.group_size), **plan.grid_choices)
        grid = span_grid(weight, group_size=plan.group_size, ratio_low=low, ratio_high=high, **plan.grid_choices)
        chosen, clip_mean = ROUNDING[plan.rounding](weight, grid), float((low.mean() + high.mean()) / 2)
    error_nearest = weighted_error(dequantize(nearest.codes, nearest.grid) - weight, scaled_moment)
    error_chosen = weighted_error(dequantize(chosen.codes, chosen.grid) - weight, scaled_moment)
    if error_chosen > error_nearest:
        reason = (
            f"clip and rounding raised the output error under this scale "
            f"({error_chosen:.3e} > {error_nearest:.3e}): nearest rounding kept"
        )
        return _decided(scaled, moment, plan, nearest, 1.0, reason)
    return _decided(scaled, moment, plan, chosen, clip_mean, None)


def _decided(
    scaled: ScaledWeight,
    moment: Tensor | None,
    plan: LinearPlan,
    chosen: QuantizedWeight,
    clip_mean: float,
    fallback: str | None,
) -> QuantizedLinear:
    original = scaled.original
    restored = scaled.restored(dequantize(chosen.codes, chosen.grid))
    plain = round_plainly(original, plan)
    errors = (dequantize(plain.codes, plain.grid) - original, restored - original)
    size = max(float(original.square().sum()), torch.finfo(torch.float32).tiny)
    output: list[float | None] = [None, None]
    if moment is not None:
        energy = max(float(row_errors(original, moment).sum()), torch.finfo(torch.float32).tiny)
        output = [weighted_error(error, moment) / energy for error in errors]
    decision = LinearDecision(
        name=plan.name,
        shape=plan.shape,
        bits=plan.bits,
        group_size=plan.group_size,
        output_error_nearest=output[0],
        output_error=output[1],
        weight_error_nearest=float(errors[0].square().sum()) / size,
        weight_error=float(errors[1].square().sum()) / size,
        clip_mean=clip_mean,
        fallback=fallback,
    )
    return QuantizedLinear(plan, chosen, restored, decision)
