"""Choosing for one block: a channel scale per fold, codes for every linear, and undoing a fold that did harm."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from awqkit.decisions import LOG2_SCALE_POINTS, FoldDecision, LinearDecision, ScaleSummary
from awqkit.methods.evidence import Evidence, MetricChoices, Readers, original_evidence
from awqkit.methods.fold import (
    ScaleChoices,
    begin_channel_scale,
    consumer_scale,
    scale_costs,
    smoothing_errors,
    storage_cost,
)
from awqkit.methods.linear import (
    QuantizedLinear,
    RestoredLinear,
    Rounded,
    Rounder,
    ScaledWeight,
    begin_linear,
    plain_weight,
    round_rows_alike,
)
from awqkit.methods.rows import joined_rows, sensitive_rounder
from awqkit.model.producers import StoredProducer, store_producer
from awqkit.model.structure import Fold, LinearInput
from awqkit.numerics.grid import QuantizedWeight, dequantize
from awqkit.numerics.scale_summary import scale_summary
from awqkit.numerics.statistics import second_moment
from awqkit.pipeline.block_statistics import BlockStatistics
from awqkit.pipeline.context import BlockContext
from awqkit.pipeline.expert_tokens import share_of_tokens
from awqkit.recipe import Recipe

ROWS_WORTH_SHARING = 2048  # of a linear, from which on its rows are rounded in parts
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

    statistics: BlockStatistics
    row_weights: Mapping[str, Tensor]


EvidenceOf = Callable[[LinearInput, Mapping[str, QuantizedLinear]], Callable[[], Evidence]]


@dataclass(frozen=True, slots=True)
class ConsumerErrors:
    """What one linear adds to the errors of a fold that it reads from: plain rounding at s = 1, and what was chosen.

    plain_inputs, chosen_inputs: what rounding its inputs per token adds, 0 where they stay as they are.
    """

    plain: float
    chosen: float
    plain_inputs: float = 0.0
    chosen_inputs: float = 0.0


def choose_plainly(context: BlockContext, originals: OriginalEvidences | None = None) -> Choice:
    """Plain rounding for every linear, no scales; the evidence only serves to report errors."""
    scaled = {view.name: ScaledWeight.unscaled(context.weight(view.name)) for view in context.structure.linears}
    quantized = {}
    for name, plan in context.block_plan.linears.items():
        if plan.keep is None:
            evidence = None if originals is None else originals.brought(context.structure.input_of(name))
            plainly = replace(plan, clip="none", rounding="nearest", rounds=0)
            quantized[name] = begin_linear(scaled[name], evidence, plainly)()
    return Choice(scaled, quantized, ())


def restored_plainly(context: BlockContext) -> dict[str, RestoredLinear]:
    """What plain rounding makes of every quantized linear, without codes or a Decision."""
    found = {}
    for name, plan in context.block_plan.linears.items():
        if plan.keep is None:
            scaled = ScaledWeight.unscaled(context.weight(name))
            plain = context.across.replays.call(plain_weight, scaled, plan.nameless)
            found[name] = RestoredLinear(scaled.channel_scale, plain)
    return found


class OriginalEvidences(Mapping[str, Evidence]):
    """Evidence of every input on the original stream, by its first reader, made when it is first asked for.

    An expert's is not kept: there may be hundreds. A rank makes what its own folds and linears ask for, of experts in
    chunks those whose chunk was brought.
    """

    def __init__(self, context: BlockContext, measured: Measured) -> None:
        self._context, self._measured = context, measured
        self._choices = metric_choices(context.recipe) if context.plan.linears[0].needs_factor else None
        entries = [entry for entry in context.structure.inputs if quantized_readers(context, entry)]
        self._entries = {entry.first: entry for entry in entries}
        self._made: dict[str, Evidence] = {}

    def __getitem__(self, first: str) -> Evidence:
        entry = self._entries[first]
        if entry.expert is not None:
            return self._make(entry)
        if first not in self._made:
            self._made[first] = self._make(entry)
        return self._made[first]

    def let_go(self) -> None:
        """Hold none of those made so far: with propagation the folds are all that asks for them."""
        self._made.clear()

    def brought(self, entry: LinearInput) -> Evidence:
        """That of an input, with its chunk if it is in one. All ranks at once."""
        self._measured.statistics.bring([entry])
        return self[entry.first]

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
    """Search every fold, quantize every linear, and undo folds whose consumers got worse.

    evidence_of(input, quantized): what the readers of an input are judged by; with propagation once all linears before
    it are quantized, so in order of data flow.
    Undoing a fold takes up the work again where its s was first in use. Experts in chunks are done chunk by chunk.
    """
    statistics, waiting = measured.statistics, _by_chunk(context, folds, measured.statistics)
    applied = _search_all(context, waiting.pop(None, ()), measured, originals)
    entries = [entry for entry in context.structure.inputs if quantized_readers(context, entry)]
    quantized: dict[str, QuantizedLinear] = {}
    errors: dict[str, ConsumerErrors] = {}
    position, evidences = 0, dict[str, Callable[[], Evidence]]()
    while position < len(entries):
        together = _independent(entries, position, statistics, all_are=not context.recipe.propagates)
        statistics.bring(together)
        applied += _search_all(context, waiting.pop(statistics.chunk_of(together[0]), ()), measured, originals)
        if not evidences:
            evidences = {entry.first: evidence_of(entry, quantized) for entry in together}
        changed, at, again = set(_readers_of_all(context, together)), 0, None
        while again is None and at < len(together):
            if changed:
                done = _quantize_all(context, applied, together, changed, evidences, measured)
                for name, (linear, found) in done.items():
                    quantized[name], errors[name] = linear, found
            changed = set()
            harmed = _check_folds(context, applied, together[at], errors)
            if harmed is None:
                at += 1
                continue
            first = _first_in_use(context, applied[harmed].fold)
            if first in together:  # of inputs that do not depend on one another only its own linears are done again
                changed, at = set(_changed_by(context, applied[harmed].fold)), together.index(first)
            else:
                again = first
        evidences = {}
        position = position + len(together) if again is None else entries.index(again)
        for later in entries[position:]:
            for name in quantized_readers(context, later):
                quantized.pop(name, None)
    every = [view.name for view in context.structure.linears]
    order = {id(fold): position for position, (fold, _) in enumerate(folds)}
    applied.sort(key=lambda found: order[id(found.fold)])
    return Choice(_scaled_weights(context, applied, every), quantized, tuple(applied))


def _independent(
    entries: Sequence[LinearInput], position: int, statistics: BlockStatistics, *, all_are: bool
) -> list[LinearInput]:
    """The input there and those after it, as far as they do not depend on how its readers are quantized.

    all_are: none does, since all are judged on the original stream; else none of an expert's does on another expert's.
    Of the same chunk in any case.
    """
    found = [entries[position]]
    for entry in entries[position + 1 :]:
        if not all_are and (found[0].expert is None or entry.expert is None):
            break
        if statistics.chunk_of(entry) != statistics.chunk_of(found[0]):
            break
        found.append(entry)
    return found


def _readers_of_all(context: BlockContext, entries: Sequence[LinearInput]) -> list[str]:
    return [name for entry in entries for name in quantized_readers(context, entry)]


def _changed_by(context: BlockContext, fold: Fold) -> list[str]:
    """The quantized linears that a fold's s changes: its consumers, and its producer, which is divided by it."""
    consumers = [name for name in fold.consumers if not context.kept(name)]
    producer = fold.producer_linear
    return consumers if producer is None or context.kept(producer) else [*consumers, producer]


def _first_in_use(context: BlockContext, fold: Fold) -> LinearInput:
    """The first input whose readers a fold's s changes: those of its consumers, or of its producer, divided by s."""
    return context.structure.inputs_of(_changed_by(context, fold))[0]


def _quantize_all(
    context: BlockContext,
    applied: Sequence[AppliedFold],
    entries: Sequence[LinearInput],
    names: Collection[str],
    evidences: Mapping[str, Callable[[], Evidence]],
    measured: Measured,
) -> dict[str, tuple[QuantizedLinear, ConsumerErrors]]:
    """Those readers of `entries` that are named, each quantized by one rank, and what they cost, on every rank.

    An expert's readers stay together, so that its evidence is made once.
    """
    shares: list[tuple[LinearInput, list[str]]] = []
    for entry in entries:
        wanted = [name for name in quantized_readers(context, entry) if name in names]
        shares += [(entry, wanted)] if entry.expert is not None and wanted else [(entry, [name]) for name in wanted]
    scaled = _scaled_weights(context, applied, [name for _, wanted in shares for name in wanted])
    rounded = _round_in_parts(context, scaled, shares, evidences, measured)
    made: dict[str, QuantizedLinear] = {}

    def begin(entry: LinearInput, wanted: Sequence[str]) -> Callable[[], dict[str, tuple[Any, ...]]]:
        evidence, place = evidences[entry.first](), quantized_readers(context, entry).index
        begun = []
        for name in wanted:
            aimed = replace(scaled[name], target=evidence.target(scaled[name].original, place(name)))
            linear = _begin_rounding(context, applied, aimed, evidence, measured, name, rounded.get(name))
            begun.append((name, aimed, linear))

        def done() -> dict[str, tuple[Any, ...]]:
            sent = {}
            for name, aimed, linear in begun:
                made[name] = found = linear()
                errors = _consumer_errors(context, applied, aimed, found, measured, name)
                is_known = name in rounded and found.quantized is rounded[name].quantized
                sent[name] = None if is_known else found.quantized, found.decision, errors
            return sent

        return done

    costs = [sum(context.weight(name).numel() for name in wanted) for _, wanted in shares]
    overlapped = context.across.replays.overlapped
    results = context.ranks.spread([partial(begin, *share) for share in shares], costs, overlapped)
    found = {name: each for result in results for name, each in result.items()}
    return {
        name: (made[name] if name in made else _arrived(context, scaled[name], name, codes, decision, rounded), errors)
        for name, (codes, decision, errors) in found.items()
    }


def _round_in_parts(
    context: BlockContext,
    scaled: Mapping[str, ScaledWeight],
    shares: Sequence[tuple[LinearInput, Sequence[str]]],
    evidences: Mapping[str, Callable[[], Evidence]],
    measured: Measured,
) -> dict[str, Rounded]:
    """Large linears, whose rows do not meet, after clip, rounding and refinement: each rank has some rows of each."""
    pieces: list[tuple[str, LinearInput, slice]] = []
    parts = context.ranks.num_pieces
    for entry, wanted in shares:
        for name in wanted if entry.expert is None and parts > 1 else ():
            rows, row_weight = len(context.weight(name)), measured.row_weights.get(name)
            if rows >= ROWS_WORTH_SHARING and (row_weight is None or row_weight.dim() == 1):
                ends = [rows * part // parts for part in range(parts + 1)]
                pieces += [(name, entry, slice(*each)) for each in pairwise(ends)]

    def work(name: str, entry: LinearInput, rows: slice) -> Rounded:
        evidence, whole = evidences[entry.first](), scaled[name]
        target = evidence.target(whole.original, quantized_readers(context, entry).index(name), rows)
        return round_rows_alike(whole.of_rows(target, rows), evidence, context.block_plan.linears[name])

    costs = [context.weight(name)[rows].numel() for name, _, rows in pieces]
    found: dict[str, list[Rounded]] = {}
    done = context.ranks.spread([partial(work, *piece) for piece in pieces], costs)
    for (name, _, _), part in zip(pieces, done, strict=True):
        found.setdefault(name, []).append(part)
    return {
        name: joined_rows(of_linear, torch.arange(len(context.weight(name)), device=context.device))
        for name, of_linear in found.items()
    }


def _arrived(
    context: BlockContext,
    scaled: ScaledWeight,
    name: str,
    quantized: QuantizedWeight | None,
    decision: LinearDecision,
    rounded: Mapping[str, Rounded],
) -> QuantizedLinear:
    """A linear that another rank decided on; what its codes mean is computed here, as it was there.

    quantized: None where it is what was `rounded` in parts, which every rank has.
    """
    quantized = rounded[name].quantized if quantized is None else quantized
    restored = scaled.restored(dequantize(quantized.codes, quantized.grid))
    return QuantizedLinear(context.block_plan.linears[name], quantized, scaled.channel_scale, restored, decision)


def _is_asked(applied: Sequence[AppliedFold], name: str) -> bool:
    """Whether a linear's errors count in a fold's."""
    return any(each.in_use and name in each.fold.consumers for each in applied)


def _consumer_errors(
    context: BlockContext,
    applied: Sequence[AppliedFold],
    scaled: ScaledWeight,
    linear: QuantizedLinear,
    measured: Measured,
    name: str,
) -> ConsumerErrors:
    if context.recipe.activations == "none" or not _is_asked(applied, name):
        return ConsumerErrors(*linear.row_errors)
    sample = measured.statistics[context.structure.input_of(name).first].sample
    assert sample is not None  # `Recipe.looks_at_tokens`
    weights = row_weights_of(context, [name], measured)
    return ConsumerErrors(*linear.row_errors, *smoothing_errors([scaled], weights, [sample]))


def _begin_rounding(
    context: BlockContext,
    applied: Sequence[AppliedFold],
    scaled: ScaledWeight,
    evidence: Evidence,
    measured: Measured,
    name: str,
    rounded: Rounded | None = None,
) -> Callable[[], QuantizedLinear]:
    """A linear on its way. rounded: what clip, rounding and refinement have made of it already, if they have."""
    plan, row_weight = context.block_plan.linears[name], measured.row_weights.get(name)
    sensitive = row_weight is not None and row_weight.dim() == 2
    rounder: Rounder = round_rows_alike
    if rounded is not None:
        rounder = _given(rounded)
    elif sensitive:
        rounder = sensitive_rounder(row_weight)
    fold_weight = row_weights_of(context, [name], measured)[0] if _is_asked(applied, name) else None
    replays = context.across.replays if rounder is round_rows_alike else None
    return begin_linear(scaled, evidence, plan, row_weight if sensitive else None, rounder, fold_weight, replays)


def _given(rounded: Rounded) -> Rounder:
    return lambda *asked: rounded


def _check_folds(
    context: BlockContext, applied: list[AppliedFold], entry: LinearInput, errors: Mapping[str, ConsumerErrors]
) -> int | None:
    """Put the consumers' errors into the Decisions of the folds that `entry` is the last to read; undo the first that
    did harm. Returns the position in `applied` of the fold that was undone, or None.
    """
    for position, applied_fold in enumerate(applied):
        if not applied_fold.in_use or applied_fold.fold.channel_of.keys().isdisjoint(entry.readers):
            continue
        consumers = [name for name in applied_fold.fold.consumers if not context.kept(name)]
        if entry is not context.structure.inputs_of(consumers)[-1]:
            continue
        plain, chosen = fold_cost([errors[name] for name in consumers])
        decision = replace(applied_fold.decision, error_nearest=plain, error_chosen=chosen)
        if chosen > plain:
            reason = f"scaling raised the consumers' error ({chosen:.3e} > {plain:.3e}): s = 1 restored"
            applied[position] = _undone(context, applied_fold, replace(decision, fallback=reason))
            return position
        applied[position] = replace(applied_fold, decision=decision)
    return None


def fold_cost(consumers: Sequence[ConsumerErrors]) -> tuple[float, float]:
    """What plain rounding at s = 1 costs all consumers of a fold, and what was chosen does."""
    plain, chosen = sum(each.plain for each in consumers), sum(each.chosen for each in consumers)
    inputs = sum(each.plain_inputs for each in consumers), sum(each.chosen_inputs for each in consumers)
    return plain + inputs[0], chosen + inputs[1]


def _search_all(
    context: BlockContext,
    folds: Sequence[tuple[Fold, float]],
    measured: Measured,
    originals: Mapping[str, Evidence],
) -> list[AppliedFold]:
    """Every fold searched by one rank; all have what was found."""

    def begin(fold: Fold, proof_error: float) -> Callable[[], tuple[Tensor, Mapping[str, Tensor], FoldDecision]]:
        return _begin_search(context, fold, proof_error, measured, originals)

    costs = [sum(context.weight(name).numel() for name in fold.consumers) for fold, _ in folds]
    overlapped = context.across.replays.overlapped
    results = context.ranks.spread([partial(begin, *each) for each in folds], costs, overlapped)
    return [AppliedFold(fold, *found) for (fold, _), found in zip(folds, results, strict=True)]


def _by_chunk(
    context: BlockContext, folds: Sequence[tuple[Fold, float]], statistics: BlockStatistics
) -> dict[int | None, list[tuple[Fold, float]]]:
    """The folds that lie inside experts of each chunk, which wait until that is brought; all others under None."""
    found: dict[int | None, list[tuple[Fold, float]]] = {}
    for fold, proof_error in folds:
        ends = [*fold.consumers, *filter(None, [fold.producer_linear])]
        chunks = {statistics.chunk_of(entry) for entry in context.structure.inputs_of(ends)}
        found.setdefault(chunks.pop() if len(chunks) == 1 else None, []).append((fold, proof_error))
    return found


def _begin_search(
    context: BlockContext,
    fold: Fold,
    proof_error: float,
    measured: Measured,
    originals: Mapping[str, Evidence],
) -> Callable[[], tuple[Tensor, Mapping[str, Tensor], FoldDecision]]:
    """A fold on its way: s, what is stored of its producer, and the Decision."""
    consumers = [name for name in fold.consumers if not context.kept(name)]
    entries = context.structure.inputs_of(consumers)
    recipe, readers = context.recipe, readers_named(context, consumers, measured)
    if len(entries) == 1 and measured.statistics.has(entries[0].first):
        statistics, evidence = measured.statistics[entries[0].first], originals[entries[0].first]
    else:  # one s for what several tensors are made of: all their tokens, as often as they are read
        statistics = measured.statistics.pooled(entries)
        readers = replace(readers, row_weights=tuple(row_weights_of(context, consumers, measured)))
        choices = metric_choices(recipe) if context.plan.linears[0].needs_factor else None
        evidence = original_evidence(statistics, readers, choices)
    searched = begin_channel_scale(
        readers,
        statistics,
        evidence,
        context.across.tied(fold, consumers[0]),
        context.block_plan.linears[consumers[0]],
        ScaleChoices(
            recipe.channel_scale, recipe.scale_families, recipe.importance, recipe.alpha_search, recipe.smooth_alpha
        ),
        context.across.replays,
    )

    def done() -> tuple[Tensor, Mapping[str, Tensor], FoldDecision]:
        found = searched()
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
        return stored.channel_scale, stored.values, decision

    return done


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
    store = partial(store_producer, fold, context.producer(fold), channel_scale, context.plan.stored_dtype)
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
            moment = second_moment(measured.statistics.stand_in(context.structure.input_of(name).first))
            costs[position] += storage_cost(context.weight(name), scale, moment, row_weight, context.plan.stored_dtype)
    return (rounded, ROUNDED) if costs[1] < costs[0] else (exact, EXACT)


def _undone(context: BlockContext, entry: AppliedFold, decision: FoldDecision) -> AppliedFold:
    ones = torch.ones_like(entry.channel_scale)
    producer = context.producer(entry.fold)
    return AppliedFold(entry.fold, ones, {name: producer[name] for name in entry.stored}, decision)


def _scaled_weights(
    context: BlockContext, applied: Sequence[AppliedFold], names: Sequence[str]
) -> dict[str, ScaledWeight]:
    """The linears named, aiming at their own weights, with the s of every fold, in the order of the names."""
    return {name: _scaled_weight(context, applied, name) for name in names}


def _scaled_weight(context: BlockContext, applied: Sequence[AppliedFold], name: str) -> ScaledWeight:
    weight, columns, rows = context.weight(name), list[Tensor](), list[Tensor]()
    for entry in applied:
        if name in entry.fold.channel_of:
            columns.append(context.across.tied(entry.fold, name).scale(entry.channel_scale))
        if name == entry.fold.producer_linear:
            rows.append(entry.channel_scale)
    if not columns:
        columns.append(torch.ones(weight.shape[1], device=weight.device))
    return ScaledWeight(weight, weight, reduce(torch.mul, columns), reduce(torch.mul, rows) if rows else None)


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
