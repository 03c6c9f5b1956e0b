"""Choosing for one block: a channel scale per fold, codes for every linear, and undoing a fold that did harm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from awqkit.decisions import LOG2_SCALE_POINTS, FoldDecision, ScaleSummary
from awqkit.methods.evidence import Evidence, MetricChoices, Readers, original_evidence
from awqkit.methods.fold import (
    ScaleChoices,
    Tied,
    consumer_scale,
    fold_errors,
    search_channel_scale,
    smoothing_errors,
)
from awqkit.methods.linear import QuantizedLinear, ScaledWeight, quantize_linear, round_rows_alike
from awqkit.methods.rows import sensitive_rounder
from awqkit.model.producers import store_producer
from awqkit.model.structure import Fold, LinearInput
from awqkit.numerics.scale_summary import scale_summary
from awqkit.numerics.statistics import Statistics
from awqkit.pipeline.context import BlockContext
from awqkit.recipe import Recipe


@dataclass(frozen=True, slots=True)
class AppliedFold:
    """A proved fold with the s that is in use (all ones after a fallback) and its producer's values on disk."""

    fold: Fold
    channel_scale: Tensor
    stored: Mapping[str, Tensor]
    decision: FoldDecision

    @property
    def in_use(self) -> bool:
        """Whether s is not known to be 1 by a fallback."""
        return self.decision.fallback is None


@dataclass(frozen=True, slots=True)
class Choice:
    """Everything chosen for a block. scaled: every linear's weight on its way; quantized: all but the kept ones."""

    scaled: Mapping[str, ScaledWeight]
    quantized: Mapping[str, QuantizedLinear]
    folds: tuple[AppliedFold, ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """What observing the block yielded. statistics: of each input on the original stream, by its first reader.

    row_weights: by linear, `[out]` or `[out, out]`, see `methods.evidence.Readers`.
    """

    statistics: Mapping[str, Statistics]
    row_weights: Mapping[str, Tensor]


EvidenceOf = Callable[[LinearInput, Mapping[str, QuantizedLinear]], Evidence]


def choose_plainly(context: BlockContext, evidence: Mapping[str, Evidence]) -> Choice:
    """Plain rounding for every linear, no scales; the evidence only serves to report errors."""
    scaled = {view.name: ScaledWeight.unscaled(context.weight(view.name)) for view in context.structure.linears}
    quantized = {
        name: quantize_linear(
            scaled[name],
            evidence.get(context.structure.input_of(name).first),
            replace(plan, clip="none", rounding="nearest", rounds=0),
        )
        for name, plan in context.block_plan.linears.items()
        if plan.keep is None
    }
    return Choice(scaled, quantized, ())


def original_evidences(context: BlockContext, measured: Measured) -> dict[str, Evidence]:
    """Evidence of every input on the original stream, by its first reader."""
    choices = metric_choices(context.recipe) if context.plan.linears[0].needs_factor else None
    return {
        entry.first: original_evidence(measured.statistics[entry.first], readers_of(context, entry, measured), choices)
        for entry in context.structure.inputs
        if quantized_readers(context, entry)
    }


def choose(
    context: BlockContext,
    folds: Sequence[tuple[Fold, float]],
    measured: Measured,
    originals: Mapping[str, Evidence],
    evidence_of: EvidenceOf,
) -> Choice:
    """Search every fold, quantize every linear in order of data flow, and undo folds whose consumers got worse.

    evidence_of(input, quantized): what the readers of an input are judged by, once all linears before it are quantized.
    Undoing a fold takes up the work again where its s was first in use.
    """
    applied = [_search(context, fold, proof, measured, originals) for fold, proof in folds]
    entries = [entry for entry in context.structure.inputs if quantized_readers(context, entry)]
    quantized: dict[str, QuantizedLinear] = {}
    targets: dict[str, Tensor] = {}
    position, evidence = 0, None
    while position < len(entries):
        entry = entries[position]
        evidence = evidence_of(entry, quantized) if evidence is None else evidence
        names = quantized_readers(context, entry)
        targets.update({name: evidence.target(context.weight(name)) for name in names})
        scaled = _scaled_weights(context, applied, targets)
        for name in names:
            quantized[name] = _quantize(context, scaled[name], evidence, measured, name)
        harmed = _check_folds(context, applied, entry, quantized, scaled, evidence, measured)
        if harmed is None:
            position, evidence = position + 1, None
            continue
        producer = applied[harmed].fold.producer_linear  # its rows were on their way divided by s
        again = entry if producer is None or context.kept(producer) else context.structure.input_of(producer)
        evidence = evidence if again is entry else None
        position = entries.index(again)
        for later in entries[position:]:
            for name in quantized_readers(context, later):
                quantized.pop(name, None)
                targets.pop(name, None)
    return Choice(_scaled_weights(context, applied, targets), quantized, tuple(applied))


def _quantize(
    context: BlockContext, scaled: ScaledWeight, evidence: Evidence, measured: Measured, name: str
) -> QuantizedLinear:
    row_weight = measured.row_weights.get(name)
    sensitive = row_weight is not None and row_weight.dim() == 2
    return quantize_linear(
        scaled,
        evidence,
        context.block_plan.linears[name],
        row_weight if sensitive else None,
        sensitive_rounder(row_weight) if sensitive else round_rows_alike,
    )


def _check_folds(
    context: BlockContext,
    applied: list[AppliedFold],
    entry: LinearInput,
    quantized: Mapping[str, QuantizedLinear],
    scaled: Mapping[str, ScaledWeight],
    evidence: Evidence,
    measured: Measured,
) -> int | None:
    """Put the consumers' errors into the Decisions of the folds that feed `entry`; undo the first that did harm.

    Returns the position in `applied` of the fold that was undone, or None.
    """
    for position, applied_fold in enumerate(applied):
        consumers = [name for name in applied_fold.fold.consumers if not context.kept(name)]
        if not applied_fold.in_use or consumers[0] not in entry.readers:
            continue
        weights = [measured.row_weights[name] for name in consumers]
        plain, chosen = fold_errors(
            [quantized[name] for name in consumers], [scaled[name] for name in consumers], weights, evidence.moment
        )
        if context.recipe.activations != "none":
            added = smoothing_errors(
                [scaled[name] for name in consumers], weights, measured.statistics[entry.first].sample
            )
            plain, chosen = plain + added[0], chosen + added[1]
        decision = replace(applied_fold.decision, error_nearest=plain, error_chosen=chosen)
        if chosen > plain:
            reason = f"scaling raised the consumers' error ({chosen:.3e} > {plain:.3e}): s = 1 restored"
            applied[position] = _undone(context, applied_fold, replace(decision, fallback=reason))
            return position
        applied[position] = replace(applied_fold, decision=decision)
    return None


def _search(
    context: BlockContext,
    fold: Fold,
    proof_error: float,
    measured: Measured,
    originals: Mapping[str, Evidence],
) -> AppliedFold:
    consumers = [name for name in fold.consumers if not context.kept(name)]
    first = context.structure.input_of(consumers[0]).first
    recipe = context.recipe
    found = search_channel_scale(
        _readers(context, consumers, measured),
        measured.statistics[first],
        originals[first],
        Tied(fold.channel_of[consumers[0]], fold.num_channels),
        context.block_plan.linears[consumers[0]],
        ScaleChoices(
            recipe.channel_scale, recipe.scale_families, recipe.importance, recipe.alpha_search, recipe.smooth_alpha
        ),
    )
    keeps = len(consumers) < len(fold.consumers) or (
        fold.producer_linear is not None and context.kept(fold.producer_linear)
    )
    stored = store_producer(
        fold, context.oriented, found.per_channel, context.plan.stored_dtype, keeps_full_precision=keeps
    )
    scale = ScaleSummary(**scale_summary(stored.channel_scale, LOG2_SCALE_POINTS)._asdict())
    decision = FoldDecision(
        fold.label, fold.kind, fold.consumers, fold.num_channels, proof_error, alpha=found.alpha, scale=scale
    )
    return AppliedFold(fold, stored.channel_scale, stored.values, decision)


def _undone(context: BlockContext, entry: AppliedFold, decision: FoldDecision) -> AppliedFold:
    ones = torch.ones_like(entry.channel_scale)
    return AppliedFold(entry.fold, ones, {name: context.oriented[name] for name in entry.stored}, decision)


def _scaled_weights(
    context: BlockContext, applied: Sequence[AppliedFold], targets: Mapping[str, Tensor]
) -> dict[str, ScaledWeight]:
    scaled = {}
    for view in context.structure.linears:
        unscaled = ScaledWeight.unscaled(context.weight(view.name))
        scaled[view.name] = replace(unscaled, target=targets.get(view.name, unscaled.original))
    for entry in applied:
        for name in entry.fold.consumers:
            scale = consumer_scale(entry.channel_scale, entry.fold.channel_of[name])
            scaled[name] = replace(scaled[name], channel_scale=scaled[name].channel_scale * scale)
        producer = entry.fold.producer_linear
        if producer is not None:
            scaled[producer] = replace(scaled[producer], row_scale=scaled[producer].row_scale * entry.channel_scale)
    return scaled


def metric_choices(recipe: Recipe) -> MetricChoices:
    """The Recipe's choices about H."""
    return MetricChoices(recipe.column_order, recipe.damping, recipe.damp_ratio, recipe.propagation)


def quantized_readers(context: BlockContext, entry: LinearInput) -> list[str]:
    """The readers of an input that are not kept in full precision."""
    return [name for name in entry.readers if not context.kept(name)]


def readers_of(context: BlockContext, entry: LinearInput, measured: Measured) -> Readers:
    """The quantized readers of an input."""
    return _readers(context, quantized_readers(context, entry), measured)


def _readers(context: BlockContext, names: Sequence[str], measured: Measured) -> Readers:
    weights = tuple(context.weight(name) for name in names)
    rows = (measured.row_weights.get(name) for name in names)
    ones = (torch.ones(len(weight), device=weight.device) for weight in weights)
    return Readers(weights, tuple(one if row is None else row for row, one in zip(rows, ones, strict=True)))
