"""One linear: grid, clip, rounding and refinement, and the check that they did no harm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from awqkit.decisions import CLIP_POINTS, SALIENT_CHANNEL_SHARES, LinearDecision
from awqkit.methods.evidence import Evidence
from awqkit.methods.plan import LinearPlan
from awqkit.methods.slots import CLIP, REFINEMENT, ROUNDING
from awqkit.numerics.grid import QuantizedWeight, dequantize, split_groups
from awqkit.numerics.histogram import counts_at
from awqkit.numerics.output_error import diagonal_blocks, moment_divided, row_errors, summed_error
from awqkit.numerics.rounding import round_nearest, span_grid
from awqkit.numerics.rounding_metric import RoundingMetric
from awqkit.numerics.saliency import saliency_shares

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class ScaledWeight:
    """A linear on its way to the quantizer: `weight` = target · s / r, float32 `[out, in]`.

    original: W as the checkpoint has it. target: what is aimed at, W itself or W* (`numerics.propagation`).
    channel_scale: s `[in]`, what the folds that it reads from multiplied its columns by.
    row_scale: r `[out]`, what the fold that it produces for divided its rows by.
    """

    original: Tensor
    target: Tensor
    channel_scale: Tensor
    row_scale: Tensor

    @classmethod
    def unscaled(cls, weight: Tensor) -> ScaledWeight:
        """The weight as the checkpoint has it."""
        rows, columns = weight.shape
        return cls(weight, weight, torch.ones(columns, device=weight.device), torch.ones(rows, device=weight.device))

    @property
    def weight(self) -> Tensor:
        """What the quantizer gets, in float32: a stored group_scale could not be divided exactly afterwards."""
        return self.target * self.channel_scale / self.row_scale.unsqueeze(1)

    def restored(self, weight: Tensor) -> Tensor:
        """A weight in the quantizer's units back in the original's: what the linear computes in the folded model."""
        return weight / self.channel_scale * self.row_scale.unsqueeze(1)


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """The codes of one linear, and the Decision.

    channel_scale: s `[in]`, which the input that it really gets was divided by. restored: float32 `[out, in]`, what the
    codes mean in the original's units.
    """

    plan: LinearPlan
    quantized: QuantizedWeight
    channel_scale: Tensor
    restored: Tensor
    decision: LinearDecision


@dataclass(frozen=True, slots=True)
class RestoredLinear:
    """What a block computes with in the place of a linear: `restored` and `channel_scale` of `QuantizedLinear`."""

    channel_scale: Tensor
    restored: Tensor


@dataclass(frozen=True, slots=True)
class Rounded:
    """Codes on a grid, and the mean share of the groups' range that was kept."""

    quantized: QuantizedWeight
    clip_mean: float
    clip_counts: tuple[int, ...] = ()


Rounder = Callable[[ScaledWeight, Evidence, LinearPlan], Rounded]


def round_plainly(weight: Tensor, plan: LinearPlan) -> QuantizedWeight:
    """Plain rounding (RTN) of float32 `[out, in]`: the whole range, the nearest code. The yardstick of everything."""
    return round_nearest(weight, span_grid(weight, group_size=plan.group_size, **plan.grid_choices))


def plain_weight(scaled: ScaledWeight, plan: LinearPlan) -> Tensor:
    """What plain rounding at s = 1 makes of the linear, float32 `[out, in]` in the original's units; r is kept."""
    row_scale = scaled.row_scale.unsqueeze(1)
    plain = round_plainly(scaled.original / row_scale, plan)
    return dequantize(plain.codes, plain.grid) * row_scale


def group_weights(
    moment: Tensor, metric: RoundingMetric | None, plan: LinearPlan, channel_scale: Tensor | None = None
) -> Tensor:
    """What scale and clip search weigh a group's error with: H's block, or the conditional variance of its columns.

    moment: H of x. channel_scale: s `[in]` where x / s is read, which `metric` is then of.
    """
    if plan.error_weight == "moment":
        blocks = diagonal_blocks(moment, plan.group_size)
        return blocks if channel_scale is None else moment_divided(blocks, channel_scale)
    assert metric is not None
    return metric.variance.reshape(-1, plan.group_size)


def round_rows_alike(scaled: ScaledWeight, evidence: Evidence, plan: LinearPlan) -> Rounded:
    """Clip, rounding and refinement by the plan; rows do not meet. The step that everything else is built around."""
    weight = scaled.weight
    metric = None if evidence.metric is None else evidence.metric.scaled(scaled.channel_scale)
    ratio_low, ratio_high, clip_mean, clip_counts = None, None, 1.0, ()
    clip = CLIP[plan.clip]
    if clip is not None:
        weights = group_weights(evidence.moment, metric, plan, scaled.channel_scale)
        ratio_low, ratio_high = clip(split_groups(weight, plan.group_size), weights, **plan.grid_choices)
        clip_mean = float((ratio_low.mean() + ratio_high.mean()) / 2)
        clip_counts = counts_at(torch.stack([ratio_low, ratio_high]), CLIP_POINTS)
    grid = span_grid(
        weight, group_size=plan.group_size, ratio_low=ratio_low, ratio_high=ratio_high, **plan.grid_choices
    )
    chosen = ROUNDING[plan.rounding](weight, grid, metric)
    for _ in range(plan.rounds):
        for step in plan.refinement:
            chosen = REFINEMENT[step](weight, chosen, metric, plan.stored_dtype)
    return Rounded(chosen, clip_mean, clip_counts)


def quantize_linear(
    scaled: ScaledWeight,
    evidence: Evidence | None,
    plan: LinearPlan,
    row_weight: Tensor | None = None,
    round_rows: Rounder = round_rows_alike,
) -> QuantizedLinear:
    """The quantized linear, never worse than nearest rounding of the same target under the same s.

    evidence: of the input that it gets, or None without calibration (then nothing is searched). row_weight: as
    `output_error.weighted_error` takes it, what "worse" is measured with.
    """
    nearest = Rounded(round_plainly(scaled.weight, plan), 1.0)
    if evidence is None:
        return _decided(scaled, None, plan, nearest, _restored(scaled, nearest), None)
    chosen = round_rows(scaled, evidence, plan)
    restored = [_restored(scaled, each) for each in (nearest, chosen)]
    sums = [summed_error(each - scaled.target, evidence.moment, row_weight) for each in restored]
    errors = torch.stack(sums).tolist()
    if errors[1] > errors[0]:
        reason = (
            f"clip and rounding raised the output error under this scale "
            f"({errors[1]:.3e} > {errors[0]:.3e}): nearest rounding kept"
        )
        return _decided(scaled, evidence, plan, nearest, restored[0], reason)
    return _decided(scaled, evidence, plan, chosen, restored[1], evidence.raised)


def _restored(scaled: ScaledWeight, rounded: Rounded) -> Tensor:
    return scaled.restored(dequantize(rounded.quantized.codes, rounded.quantized.grid))


def _decided(
    scaled: ScaledWeight,
    evidence: Evidence | None,
    plan: LinearPlan,
    chosen: Rounded,
    restored: Tensor,
    fallback: str | None,
) -> QuantizedLinear:
    moment = None if evidence is None else evidence.moment
    original = scaled.original
    plain = round_plainly(original, plan)
    plain_restored = dequantize(plain.codes, plain.grid)
    both = (plain_restored, restored)
    sums = [original.square().sum(), *((each - original).square().sum() for each in both)]
    if moment is not None:
        sums.append(row_errors(scaled.target, moment).sum())
        sums += [summed_error(each - scaled.target, moment) for each in both]
    size, *found = torch.stack(sums).tolist()  # one look at the device
    weight_errors = [each / max(size, _TINY) for each in found[:2]]
    output: list[float | None] = [each / max(found[2], _TINY) for each in found[3:]] or [None, None]
    decision = LinearDecision(
        name=plan.name,
        shape=plan.shape,
        bits=plan.bits,
        group_size=plan.group_size,
        output_error_nearest=output[0],
        output_error=output[1],
        weight_error_nearest=weight_errors[0],
        weight_error=weight_errors[1],
        clip_mean=chosen.clip_mean,
        fallback=fallback,
        clip_counts=chosen.clip_counts,
        propagation=0.0 if evidence is None else evidence.strength,
        saliency=() if moment is None else saliency_shares(plain_restored - original, moment, SALIENT_CHANNEL_SHARES),
    )
    return QuantizedLinear(plan, chosen.quantized, scaled.channel_scale, restored, decision)
