"""Choosing for one block: a channel scale per fold, codes for every linear, and undoing a fold that did harm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from awqkit.decisions import LOG2_SCALE_POINTS, FoldDecision, ScaleSummary
from awqkit.methods.evidence import Evidence, MetricChoices, Readers, original_evidence
from awqkit.methods.fold import (
    ScaleChoices,
    Tied,
    consumer_scale,
    fold_errors,
    scale_costs,
    search_channel_scale,
    smoothing_errors,
    storage_cost,
)
from awqkit.methods.linear import (
    QuantizedLinear,
    RestoredLinear,
    ScaledWeight,
    plain_weight,
    quantize_linear,
    round_rows_alike,
)
from awqkit.methods.rows import sensitive_rounder
from awqkit.model.producers import StoredProducer, store_producer
from awqkit.model.structure import Fold, LinearInput
from awqkit.numerics.scale_summary import scale_summary
from awqkit.numerics.statistics import Statistics, pooled, second_moment
from awqkit.pipeline.context import BlockContext
from awqkit.pipeline.expert_tokens import share_of_tokens
from awqkit.recipe import Recipe

EXACT, ROUNDED = "exact", "rounded"  # `FoldDecision.kept_columns`


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


def restored_plainly(context: BlockContext) -> dict[str, RestoredLinear]:
    """What plain rounding makes of every quantized linear, without codes or a Decision."""
    found = {}
    for name, plan in context.block_plan.linears.items():
        if plan.keep is None:
            scaled = ScaledWeight.unscaled(context.weight(name))
            found[name] = RestoredLinear(scaled.channel_scale, plain_weight(scaled, plan))
    return found


class OriginalEvidences(Mapping[str, Evidence]):
    """Evidence of every input on the original stream, by its first reader; an expert's is made when it is asked for."""

    def __init__(self, context: BlockContext, measured: Measured) -> None:
        self._context, self._measured = context, measured
        self._choices = metric_choices(context.recipe) if context.plan.linears[0].needs_factor else None
        entries = [entry for entry in context.structure.inputs if quantized_readers(context, entry)]
        self._entries = {entry.first: entry for entry in entries}
        self._made = {entry.first: self._make(entry) for entry in entries if entry.expert is None}

    def __getitem__(self, first: str) -> Evidence:
        return self._made[first] if first in self._made else self._make(self._entries[first])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _make(self, entry: LinearInput) -> Evidence:
        readers = readers_of(self._context, entry, self._measured)
        return original_evidence(self._measured.statistics[entry.first], readers, self._choices)


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
    moments: dict[str, Tensor] = {}  # of inputs that are not an expert's, as their readers met them
    position, evidence = 0, None
    while position < len(entries):
        entry = entries[position]
        evidence = evidence_of(entry, quantized) if evidence is None else evidence
        if entry.expert is None:
            moments[entry.first] = evidence.moment
        names = quantized_readers(context, entry)
        targets.update({name: evidence.target(context.weight(name)) for name in names})
        for name, scaled in _scaled_weights(context, applied, targets, names).items():
            quantized[name] = _quantize(context, scaled, evidence, measured, name)
        harmed = _check_folds(context, applied, entry, quantized, targets, moments, measured)
        if harmed is None:
            position, evidence = position + 1, None
            continue
        again = _first_in_use(context, applied[harmed].fold)
        evidence = evidence if again is entry else None
        position = entries.index(again)
        for later in entries[position:]:
            for name in quantized_readers(context, later):
                quantized.pop(name, None)
                targets.pop(name, None)
    every = [view.name for view in context.structure.linears]
    return Choice(_scaled_weights(context, applied, targets, every), quantized, tuple(applied))


def _first_in_use(context: BlockContext, fold: Fold) -> LinearInput:
    """The first input whose readers a fold's s changes: those of its consumers, or of its producer, divided by s."""
    consumers = [name for name in fold.consumers if not context.kept(name)]
    producer = fold.producer_linear
    changed = consumers if producer is None or context.kept(producer) else [*consumers, producer]
    return context.structure.inputs_of(changed)[0]


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
    targets: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    measured: Measured,
) -> int | None:
    """Put the consumers' errors into the Decisions of the folds that `entry` is the last to read; undo the first that
    did harm. Returns the position in `applied` of the fold that was undone, or None.
    """
    for position, applied_fold in enumerate(applied):
        consumers = [name for name in applied_fold.fold.consumers if not context.kept(name)]
        if not applied_fold.in_use or entry is not context.structure.inputs_of(consumers)[-1]:
            continue
        scaled = _scaled_weights(context, applied, targets, consumers)
        weights = row_weights_of(context, consumers, measured)
        inputs = [context.structure.input_of(name).first for name in consumers]
        plain, chosen = fold_errors(
            [quantized[name] for name in consumers],
            list(scaled.values()),
            weights,
            [moments[each] if each in moments else second_moment(measured.statistics[each]) for each in inputs],
        )
        if context.recipe.activations != "none":
            samples = [measured.statistics[each].sample for each in inputs]
            added = smoothing_errors(list(scaled.values()), weights, samples)
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
    entries = context.structure.inputs_of(consumers)
    recipe, statistics = context.recipe, measured.statistics[entries[0].first]
    readers = readers_named(context, consumers, measured)
    evidence = originals[entries[0].first] if len(entries) == 1 else None
    if evidence is None:  # one s for what several tensors are made of: all their tokens, as often as they are read
        statistics = pooled([measured.statistics[entry.first] for entry in entries])
        readers = replace(readers, row_weights=tuple(row_weights_of(context, consumers, measured)))
        choices = metric_choices(recipe) if context.plan.linears[0].needs_factor else None
        evidence = original_evidence(statistics, readers, choices)
    found = search_channel_scale(
        readers,
        statistics,
        evidence,
        Tied(fold.channel_of[consumers[0]], fold.num_channels),
        context.block_plan.linears[consumers[0]],
        ScaleChoices(
            recipe.channel_scale, recipe.scale_families, recipe.importance, recipe.alpha_search, recipe.smooth_alpha
        ),
    )
    stored, kept_columns = _stored(context, fold, found.per_channel, readers, evidence, measured)
    scale = ScaleSummary(**scale_summary(stored.channel_scale, LOG2_SCALE_POINTS)._asdict())
    decision = FoldDecision(
        fold.label,
        fold.kind,
        fold.consumers,
        fold.num_channels,
        proof_error,
        alpha=found.alpha,
        scale=scale,
        kept_columns=kept_columns,
    )
    return AppliedFold(fold, stored.channel_scale, stored.values, decision)


def _stored(
    context: BlockContext,
    fold: Fold,
    channel_scale: Tensor,
    readers: Readers,
    evidence: Evidence,
    measured: Measured,
) -> tuple[StoredProducer, str | None]:
    """The producer as the file will hold it, and how columns of consumers in full precision are: exact, or rounded.

    Those are exact under powers of two. Any other s rounds them to the file's dtype: taken where the quantized
    consumers gain more by it than those lose.
    """
    kept = [name for name in fold.consumers if context.kept(name)]
    keeps_producer = fold.producer_linear is not None and context.kept(fold.producer_linear)
    store = partial(store_producer, fold, context.oriented, channel_scale, context.plan.stored_dtype)
    exact = store(keeps_full_precision=bool(kept) or keeps_producer)
    if not kept:
        return exact, None
    if keeps_producer or context.recipe.activations != "none":
        return exact, EXACT
    rounded, plan = store(keeps_full_precision=False), context.block_plan.linears
    quantized = [name for name in fold.consumers if not context.kept(name)]
    costs = scale_costs(
        readers,
        evidence,
        [consumer_scale(each.channel_scale, fold.channel_of[quantized[0]]) for each in (exact, rounded)],
        plan[quantized[0]],
    )
    weights = row_weights_of(context, kept, measured)
    for position, each in enumerate((exact, rounded)):
        for name, row_weight in zip(kept, weights, strict=True):
            scale = consumer_scale(each.channel_scale, fold.channel_of[name])
            moment = second_moment(measured.statistics[context.structure.input_of(name).first])
            costs[position] += storage_cost(context.weight(name), scale, moment, row_weight, context.plan.stored_dtype)
    return (rounded, ROUNDED) if costs[1] < costs[0] else (exact, EXACT)


def _undone(context: BlockContext, entry: AppliedFold, decision: FoldDecision) -> AppliedFold:
    ones = torch.ones_like(entry.channel_scale)
    return AppliedFold(entry.fold, ones, {name: context.oriented[name] for name in entry.stored}, decision)


def _scaled_weights(
    context: BlockContext, applied: Sequence[AppliedFold], targets: Mapping[str, Tensor], names: Sequence[str]
) -> dict[str, ScaledWeight]:
    """The linears named on their way to the quantizer, with the s of every fold, in the order of the names."""
    scaled = {}
    for name in names:
        unscaled = ScaledWeight.unscaled(context.weight(name))
        scaled[name] = replace(unscaled, target=targets.get(name, unscaled.original))
    for entry in applied:
        for name in entry.fold.channel_of.keys() & scaled.keys():
            scale = consumer_scale(entry.channel_scale, entry.fold.channel_of[name])
            scaled[name] = replace(scaled[name], channel_scale=scaled[name].channel_scale * scale)
        producer = entry.fold.producer_linear
        if producer in scaled:
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
    return readers_named(context, quantized_readers(context, entry), measured)


def row_weights_of(context: BlockContext, names: Sequence[str], measured: Measured) -> list[Tensor]:
    """What errors in the rows of these linears cost side by side: an expert's as much less as it meets fewer tokens."""
    shares = [share_of_tokens(context.structure.input_of(name), measured.statistics) for name in names]
    return [measured.row_weights[name] * share for name, share in zip(names, shares, strict=True)]


def readers_named(context: BlockContext, names: Sequence[str], measured: Measured) -> Readers:
    """These linears as readers of one input."""
    weights = tuple(context.weight(name) for name in names)
    rows = (measured.row_weights.get(name) for name in names)
    ones = (torch.ones(len(weight), device=weight.device) for weight in weights)
    return Readers(weights, tuple(one if row is None else row for row, one in zip(rows, ones, strict=True)))
