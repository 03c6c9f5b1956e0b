"""One linear: grid, clip, rounding and refinement, and the check that they did no harm.

In two parts: `rounded_linear` makes tensors of tensors and looks at none of them, `begin_linear` looks at all of its
figures at once and decides, once somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from awqkit.decisions import CLIP_POINTS, SALIENT_CHANNEL_SHARES, LinearDecision
from awqkit.kernels.replay import Replays, begun
from awqkit.methods.evidence import Evidence
from awqkit.methods.plan import LinearPlan
from awqkit.methods.slots import CLIP, REFINEMENT, ROUNDING
from awqkit.numerics.grid import QuantizedWeight, dequantize, split_groups
from awqkit.numerics.histogram import counted_at
from awqkit.numerics.output_error import diagonal_blocks, moment_divided, row_errors, summed_errors
from awqkit.numerics.rounding import round_nearest, span_grid
from awqkit.numerics.rounding_metric import RoundingMetric
from awqkit.numerics.saliency import saliency_sums, shares_of_sums

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class ScaledWeight:
    """A linear on its way to the quantizer: `weight` = target · s / r, float32 `[out, in]`.

    original: W as the checkpoint has it. target: what is aimed at, W itself or W* (`numerics.propagation`).
    channel_scale: s `[in]`, what the folds that it reads from multiplied its columns by.
    row_scale: r `[out]`, what the fold that it produces for divided its rows by; None where that is 1.
    """

    original: Tensor
    target: Tensor
    channel_scale: Tensor
    row_scale: Tensor | None = None

    @classmethod
    def unscaled(cls, weight: Tensor) -> ScaledWeight:
        """The weight as the checkpoint has it."""
        return cls(weight, weight, torch.ones(weight.shape[1], device=weight.device))

    @property
    def weight(self) -> Tensor:
        """What the quantizer gets, in float32: a stored group_scale could not be divided exactly afterwards."""
        scaled = self.target * self.channel_scale
        return scaled if self.row_scale is None else scaled / self.row_scale.unsqueeze(1)

    def restored(self, weight: Tensor) -> Tensor:
        """A weight in the quantizer's units back in the original's: what the linear computes in the folded model."""
        restored = weight / self.channel_scale
        return restored if self.row_scale is None else restored * self.row_scale.unsqueeze(1)

    def of_rows(self, target: Tensor, rows: Tensor | slice) -> ScaledWeight:
        """Some rows as a weight of their own, aiming at `target`, for whoever rounds them."""
        return ScaledWeight(
            target, target, self.channel_scale, None if self.row_scale is None else self.row_scale[rows]
        )


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """The codes of one linear, and the Decision.

    channel_scale: s `[in]`, which the input that it really gets was divided by. restored: float32 `[out, in]`, what the
    codes mean in the original's units. row_errors: row-weighted errors of plain rounding at s = 1, r kept, and of the
    codes, both against the target; 0 where nobody asked.
    """

    plan: LinearPlan
    quantized: QuantizedWeight
    channel_scale: Tensor
    restored: Tensor
    decision: LinearDecision
    row_errors: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class RestoredLinear:
    """What a block computes with in the place of a linear: `restored` and `channel_scale` of `QuantizedLinear`."""

    channel_scale: Tensor
    restored: Tensor


@dataclass(frozen=True, slots=True)
class Rounded:
    """Codes on a grid. kept_range: the mean share of the groups' range that was kept, then how many ends kept how much,
    at `CLIP_POINTS`; float64, None without clip.
    """

    quantized: QuantizedWeight
    kept_range: Tensor | None = None


Rounder = Callable[[ScaledWeight, Evidence, LinearPlan], Rounded]


def round_plainly(weight: Tensor, plan: LinearPlan) -> QuantizedWeight:
    """Plain rounding (RTN) of float32 `[out, in]`: the whole range, the nearest code. The yardstick of everything."""
    return round_nearest(weight, span_grid(weight, group_size=plan.group_size, **plan.grid_choices))


def plain_weight(scaled: ScaledWeight, plan: LinearPlan) -> Tensor:
    """What plain rounding at s = 1 makes of the linear, float32 `[out, in]` in the original's units; r is kept."""
    if scaled.row_scale is None:
        plain = round_plainly(scaled.original, plan)
        return dequantize(plain.codes, plain.grid)
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
    ratio_low, ratio_high, kept_range = None, None, None
    clip = CLIP[plan.clip]
    if clip is not None:
        weights = group_weights(evidence.moment, metric, plan, scaled.channel_scale)
        ratio_low, ratio_high = clip(split_groups(weight, plan.group_size), weights, **plan.grid_choices)
        mean = (ratio_low.mean() + ratio_high.mean()) / 2
        counts = counted_at(torch.stack([ratio_low, ratio_high]), CLIP_POINTS)
        kept_range = torch.cat([mean.double().reshape(1), counts.double()])
    grid = span_grid(
        weight, group_size=plan.group_size, ratio_low=ratio_low, ratio_high=ratio_high, **plan.grid_choices
    )
    chosen = ROUNDING[plan.rounding](weight, grid, metric)
    for _ in range(plan.rounds):
        for step in plan.refinement:
            chosen = REFINEMENT[step](weight, chosen, metric, plan.stored_dtype)
    return Rounded(chosen, kept_range)


def _round_plainly(scaled: ScaledWeight, evidence: Evidence | None, plan: LinearPlan) -> Rounded:
    return Rounded(round_plainly(scaled.weight, plan))


@dataclass(frozen=True, slots=True)
class RoundedLinear:
    """What `rounded_linear` found; restored as in `QuantizedLinear`. figures: float64, read by `_Figures.of`."""

    quantized: QuantizedWeight
    restored: Tensor
    figures: Tensor


@dataclass(frozen=True, slots=True)
class _Figures:
    """All that a Decision is made of. Squares summed: of W, and of Ŵ − W plainly rounded and as chosen; output errors:
    of 0 in the place of the target, and of both; those that "worse" is judged by, of nearest rounding and as chosen;
    row-weighted ones of plain rounding, r kept, and as chosen. saliency: `saliency_sums`. kept_range: see `Rounded`.
    """

    squares: Sequence[float]
    outputs: Sequence[float] = ()
    judged: Sequence[float] = ()
    rows: Sequence[float] = ()
    saliency: Sequence[float] = ()
    kept_range: Sequence[float] = ()

    @classmethod
    def of(cls, figures: Tensor, *, judged: bool, weighs_rows: bool) -> _Figures:
        """One look at the device."""
        rest = iter(figures.tolist())
        sizes = (3, 3, 2, 2 if weighs_rows else 0, 1 + len(SALIENT_CHANNEL_SHARES)) if judged else (3,)
        parts = [list(islice(rest, size)) for size in sizes]
        return cls(*parts, kept_range=list(rest))


def rounded_linear(
    scaled: ScaledWeight,
    evidence: Evidence | None,
    plan: LinearPlan,
    row_weight: Tensor | None,
    fold_weight: Tensor | None,
    round_rows: Rounder,
) -> RoundedLinear:
    """What `round_rows` makes of a linear, and all figures that it is judged by. Nothing waits for the device."""
    original = scaled.original
    chosen = round_rows(scaled, evidence, plan)
    restored = _restored(scaled, chosen)
    plain = plain_weight(ScaledWeight(original, original, scaled.channel_scale), plan)
    squares = [original.square().sum(), *((each - original).square().sum() for each in (plain, restored))]
    if evidence is None:
        return RoundedLinear(chosen.quantized, restored, torch.stack(squares).double())
    moment, asked = evidence.moment, () if fold_weight is None else (fold_weight,)

    def judged(candidate: Tensor, *weights: Tensor | None) -> list[Tensor]:
        return summed_errors(candidate - scaled.target, moment, weights)

    (nearest,) = judged(_restored(scaled, _round_plainly(scaled, evidence, plan)), row_weight)
    output, found, *of_rows = judged(restored, None, row_weight, *asked)
    if scaled.row_scale is None:
        output_plain, *plain_rows = judged(plain, None, *asked)
    else:
        (output_plain,) = judged(plain, None)
        plain_rows = judged(plain_weight(scaled, plan), fold_weight) if asked else []
    energy = row_errors(scaled.target, moment).sum()
    sums = torch.stack([*squares, energy, output_plain, output, nearest, found, *plain_rows, *of_rows]).double()
    saliency = saliency_sums(plain - original, moment, SALIENT_CHANNEL_SHARES)
    kept_range = [] if chosen.kept_range is None else [chosen.kept_range]
    return RoundedLinear(chosen.quantized, restored, torch.cat([sums, saliency, *kept_range]))


def begin_linear(
    scaled: ScaledWeight,
    evidence: Evidence | None,
    plan: LinearPlan,
    row_weight: Tensor | None = None,
    round_rows: Rounder = round_rows_alike,
    fold_weight: Tensor | None = None,
    replays: Replays | None = None,
) -> Callable[[], QuantizedLinear]:
    """The quantized linear for whoever asks, never worse than nearest rounding of the same target under the same s.

    evidence: of the input that it gets, or None without calibration (then nothing is searched). row_weight: as
    `output_error.weighted_error` takes it, what "worse" is measured with. fold_weight: the same, what `row_errors` of
    the result are measured with, where somebody asks for them. replays: by which it may be replayed, if `round_rows` is
    a function of its arguments alone.
    """
    if evidence is None:
        found = rounded_linear(scaled, None, plan, None, None, _round_plainly)
        figures = _Figures.of(found.figures, judged=False, weighs_rows=False)
        return lambda: _decided(scaled, None, plan, found, figures, None)

    def begin(rounder: Rounder) -> Callable[[], RoundedLinear]:
        given = scaled, evidence.bare, plan.nameless, row_weight, fold_weight, rounder
        return begun(replays, rounded_linear, *given)

    def looked_at(found: RoundedLinear) -> tuple[RoundedLinear, _Figures]:
        return found, _Figures.of(found.figures, judged=True, weighs_rows=fold_weight is not None)

    started = begin(round_rows)

    def decided() -> QuantizedLinear:
        found, figures = looked_at(started())
        nearest, chosen = figures.judged
        if chosen > nearest:
            reason = (
                f"clip and rounding raised the output error under this scale "
                f"({chosen:.3e} > {nearest:.3e}): nearest rounding kept"
            )
            return _decided(scaled, evidence, plan, *looked_at(begin(_round_plainly)()), reason)
        return _decided(scaled, evidence, plan, found, figures, evidence.raised)

    return decided


def _restored(scaled: ScaledWeight, rounded: Rounded) -> Tensor:
    return scaled.restored(dequantize(rounded.quantized.codes, rounded.quantized.grid))


def _decided(
    scaled: ScaledWeight,
    evidence: Evidence | None,
    plan: LinearPlan,
    found: RoundedLinear,
    figures: _Figures,
    fallback: str | None,
) -> QuantizedLinear:
    size, *squares = figures.squares
    weight_errors = [each / max(size, _TINY) for each in squares]
    output: list[float | None] = [None, None]
    if figures.outputs:
        energy, *outputs = figures.outputs
        output = [each / max(energy, _TINY) for each in outputs]
    clip_mean, *counts = figures.kept_range or (1.0,)
    decision = LinearDecision(
        name=plan.name,
        shape=plan.shape,
        bits=plan.bits,
        group_size=plan.group_size,
        output_error_nearest=output[0],
        output_error=output[1],
        weight_error_nearest=weight_errors[0],
        weight_error=weight_errors[1],
        clip_mean=clip_mean,
        fallback=fallback,
        clip_counts=tuple(map(int, counts)),
        propagation=0.0 if evidence is None else evidence.strength,
        saliency=shares_of_sums(figures.saliency, SALIENT_CHANNEL_SHARES) if figures.saliency else (),
    )
    rows = (figures.rows[0], figures.rows[1]) if figures.rows else (0.0, 0.0)
    return QuantizedLinear(plan, found.quantized, scaled.channel_scale, found.restored, decision, rows)
