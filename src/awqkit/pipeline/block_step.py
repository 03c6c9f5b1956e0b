"""One block, from weights in memory to packed codes and stored values, in named steps. It holds no formula.

prove     every fold of this kind, on this block's real weights
observe   one pass over the calibration rows: statistics of every input, and the next block's inputs; another for each
          chunk of experts, where those of all would not fit (decision 0029)
search    a channel scale per fold, codes for every linear, with propagation in order of data flow; folds that did
          harm are undone
check     held-out rows: the block as chosen against the block plainly rounded
advance   with propagation: the quantized stream moves on
store     the values of everything that goes to disk
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial, reduce

import torch
from torch import Tensor

from awqkit.decisions import BlockDecision, FoldDecision, KeptDecision, LinearDecision
from awqkit.methods.evidence import Evidence, Readers, propagated_evidence
from awqkit.methods.linear import QuantizedLinear, RestoredLinear
from awqkit.model.block_calls import hand_on
from awqkit.model.structure import Fold, LinearInput
from awqkit.numerics.grid import QuantizedWeight
from awqkit.pipeline.activations import HiddenStates
from awqkit.pipeline.block_statistics import BlockStatistics
from awqkit.pipeline.context import BlockContext, Stream, Streams
from awqkit.pipeline.expert_tokens import picked_inputs
from awqkit.pipeline.kept_inputs import KeptInputs
from awqkit.pipeline.observe_block import (
    measure_row_weights,
    observe,
    observe_pair,
    prove_folds,
    refuse_non_finite,
)
from awqkit.pipeline.quantized_block import advance, weights_replaced
from awqkit.pipeline.row_parts import OwnRows, by_part
from awqkit.pipeline.search_block import (
    Choice,
    EvidenceOf,
    Measured,
    OriginalEvidences,
    choose,
    choose_plainly,
    metric_choices,
    readers_named,
    readers_of,
    restored_plainly,
)
from awqkit.pipeline.sensitivity import measure_sensitivity
from awqkit.pipeline.stopped_rows import StoppedRows
from awqkit.pipeline.summed_statistics import summed_numbers
from awqkit.recipe import AUTO, Recipe

Stage = Callable[[str], None]

_UNWATCHED = {2: "not called exactly once as a linear in this block"}
_STACKED = "several matrices in one parameter, or a convolution: stays in full precision"


@dataclass(frozen=True, slots=True)
class BlockResult:
    """What one block leaves behind.

    quantized: linear name inside the block -> codes. stored: parameter name inside the block -> its new value where it
    differs from the source's, float32.
    """

    quantized: Mapping[str, QuantizedWeight]
    stored: Mapping[str, Tensor]
    decision: BlockDecision


@dataclass(frozen=True, slots=True)
class Observed:
    """What the calibration rows say of a block; every recipe of one `sensitivity` can be applied to it.

    row_weights: see `Measured`, empty where no recipe asks. token_weight: `[rows, tokens]` that the statistics were
    taken with, or None. kept: the linear inputs themselves, if any recipe propagates.
    """

    statistics: BlockStatistics
    row_weights: Mapping[str, Tensor]
    token_weight: Tensor | None
    kept: KeptInputs | None

    def measured_for(self, recipe: Recipe, group_size: int, stage: Stage) -> Measured:
        """What a recipe with groups of that size gets of it: the same, whoever else asked for more."""
        statistics = self.statistics.for_search(stage, None if recipe.looks_across_groups else group_size)
        return Measured(statistics, self.row_weights if _weighs_rows(recipe) else {})


@dataclass(frozen=True, slots=True)
class Proofs:
    """Folds that are exact in a block, with the proof's error, and a Decision for each one refused."""

    exact: tuple[tuple[Fold, float], ...] = ()
    refused: tuple[FoldDecision, ...] = ()


def quantize_block(context: BlockContext, streams: Streams | None, stage: Stage) -> BlockResult:
    """All steps for one block; without streams (a recipe that looks at no text) it is rounded plainly."""
    refuse_non_finite(context)
    if streams is None:
        stage("round")
        return round_block(context)[1]
    stage("prove")
    proofs = prove_block(context, streams.probe)
    stage("observe")
    observed = observe_block(context, streams, (context.recipe,))
    return quantize_observed(context, proofs, observed, streams.calibration.quantized, streams.held_out, stage)[1]


def round_block(context: BlockContext) -> tuple[Choice, BlockResult]:
    """The block plainly rounded, by a recipe that looks at no text."""
    choice = choose_plainly(context)
    return choice, _result(context, choice, ())


def prove_block(context: BlockContext, probe: HiddenStates) -> Proofs:
    """The folds that the recipe may use here; none where it searches no scales. probe: rows at the block's input."""
    if not context.recipe.scales_channels:
        return Proofs()
    exact, refused = prove_folds(context, probe)
    return Proofs(tuple(exact), tuple(refused))


def observe_block(context: BlockContext, streams: Streams, recipes: Sequence[Recipe]) -> Observed:
    """All that any of `recipes` asks for; calibration rows (original stream) and probe move on to the block's output.

    The recipes differ in nothing that the measurement depends on: seed and sensitivity.
    """
    original, gradients, index = streams.calibration.original, streams.gradients, context.index
    kept = None
    if any(recipe.propagates for recipe in recipes):
        rows, tokens = original.shape[:2]
        entries = [entry for entry in context.structure.inputs if entry.expert is None]
        memory = context.memory
        reserved = memory.statistics + memory.search + original.tokens_per_batch * memory.token
        kept = KeptInputs(entries, rows, tokens, context.device, reserved)
    row_weights: Mapping[str, Tensor] = {}
    if gradients is not None:
        felt = partial(gradients.beside, index)
        row_weights = measure_sensitivity(context, original, gradients.at(index), felt)
        advance(context, streams.probe, {})
    elif any(_weighs_rows(recipe) for recipe in recipes):
        row_weights = context.ranks.everyones(measure_row_weights(context, streams.probe))[0]  # one for all
    token_weight = streams.token_weight(index)
    alone_in_groups = len(recipes) == 1 and not recipes[0].looks_across_groups
    group_size = context.plan.group_size if alone_in_groups else None
    sampled = any(recipe.looks_at_tokens for recipe in recipes)
    statistics = observe(context, original, token_weight, kept, group_size, sampled=sampled)
    if kept is not None:
        kept.agree_on_sources(context.ranks)
    return Observed(statistics, row_weights, token_weight, kept)


def _weighs_rows(recipe: Recipe) -> bool:
    return recipe.sensitivity != "none" or recipe.scales_channels or recipe.column_order == "energy"


def quantize_observed(
    context: BlockContext,
    proofs: Proofs,
    observed: Observed,
    quantized_stream: HiddenStates | None,
    held_out: Stream | None,
    stage: Stage,
) -> tuple[Choice, BlockResult]:
    """Search, check and advance: the choice, for whoever goes on computing with it, and what is stored of it.

    quantized_stream: the calibration rows' where the recipe propagates. It and both of `held_out` move on to the
    block's output.
    """
    measured = observed.measured_for(context.recipe, context.plan.group_size, stage)
    originals = OriginalEvidences(context, measured)
    with ExitStack() as stack:
        rows, evidence_of = None, _on_the_original(originals)
        if quantized_stream is not None:
            rows = stack.enter_context(closing(StoppedRows(context, quantized_stream)))
            own = quantized_stream.own
            evidence_of = _on_both_streams(context, observed, measured, originals, rows, own, held_out, stage)
        stage("search")
        choice = choose(context, proofs.exact, measured, originals, evidence_of)
        refused, fallback, errors = proofs.refused, None, None
        if held_out is not None:
            stage("check")
            choice, undone, errors, fallback = _better_held_out(context, held_out, choice, originals)
            refused = (*refused, *undone)
        if rows is not None:
            stage("advance")
            rows.finish(choice.quantized)
    return choice, _result(context, choice, refused, errors, fallback, observed.statistics)


def _better_held_out(
    context: BlockContext, held_out: Stream, choice: Choice, originals: OriginalEvidences
) -> tuple[Choice, list[FoldDecision], tuple[float, float], str | None]:
    """The choice, or plain rounding where that is better on held-out rows; then what was undone, errors, the reason."""
    (plain, chosen), reached = check_held_out(context, held_out, (restored_plainly(context), choice.quantized))
    is_worse = chosen > plain
    if held_out.quantized is not None:
        held_out.quantized.take(reached[0 if is_worse else 1])
    if not is_worse:
        return choice, [], (plain, chosen), None
    fallback = f"held-out rows were worse than with plain rounding ({chosen:.3e} > {plain:.3e}): block rounded plainly"
    undone = [replace(entry.decision, fallback=entry.decision.fallback or fallback) for entry in choice.folds]
    return choose_plainly(context, originals), undone, (plain, plain), fallback


def _with_tokens(
    context: BlockContext, name: str, decision: LinearDecision, statistics: BlockStatistics
) -> LinearDecision:
    """Where the linear is an expert's: how many tokens met it, and why its choice is a guess where none did."""
    entry = context.structure.input_of(name)
    if entry.expert is None:
        return decision
    tokens = statistics.tokens(entry.first)
    reason = None if tokens else "no calibration token met this expert: rounded by what the others read"
    return replace(decision, tokens=tokens, fallback=decision.fallback or reason)


def _on_the_original(originals: Mapping[str, Evidence]) -> EvidenceOf:
    return lambda entry, quantized: partial(originals.__getitem__, entry.first)


def _on_both_streams(
    context: BlockContext,
    observed: Observed,
    measured: Measured,
    originals: OriginalEvidences,
    rows: StoppedRows,
    own: OwnRows,
    held_out: Stream | None,
    stage: Stage,
) -> EvidenceOf:
    """With propagation: the original's input as it was kept, and the one that the quantized stream reaches.

    own: which rows these are. What all ranks must compute together is done at once, the rest when it is asked for. The
    way there is a stage of its own, "follow", amid the search.
    """
    assert observed.kept is not None
    kept, structure = observed.kept, context.structure
    choices, picked = metric_choices(context.recipe), picked_inputs(context.structure)
    position = {entry.first: number for number, entry in enumerate(structure.inputs)}
    found: dict[str, tuple[list[QuantizedLinear], Evidence]] = {}  # by source, with the linears that it was found with
    before_source: dict[str, list[str]] = {}

    def evidence(entry: LinearInput, quantized: Mapping[str, QuantizedLinear]) -> Callable[[], Evidence]:
        if entry.expert is not None:
            return of_expert(entry, quantized)
        found_now = of_every_token(entry, quantized, readers_of(context, entry, measured))
        return lambda: found_now

    def of_expert(entry: LinearInput, quantized: Mapping[str, QuantizedLinear]) -> Callable[[], Evidence]:
        """Its own tokens' H, and the correction that all tokens of what it picks from ask for.

        Which tokens meet an expert differs from stream to stream, so its own cannot be paired.
        """
        source = kept.source_of(entry.expert.experts)
        if source is None or entry.first not in picked:
            return partial(originals.__getitem__, entry.first)
        if source not in before_source:  # which is the same for all of a block's experts
            entries = structure.inputs[: position[source]]
            before_source[source] = [name for each in entries for name in each.readers]
        before = [quantized[name] for name in before_source[source] if name in quantized]
        known = found.get(source)
        if known is None or [id(each) for each in known[0]] != [id(each) for each in before]:
            whole = structure.input_of(source)
            readers = readers_named(context, whole.readers, measured)
            found[source] = known = before, of_every_token(whole, quantized, readers, for_others=True)
        of_all = known[1]
        return lambda: replace(originals[entry.first], shift=of_all.shift, strength=of_all.strength)

    def of_every_token(
        entry: LinearInput, quantized: Mapping[str, QuantizedLinear], readers: Readers, *, for_others: bool = False
    ) -> Evidence:
        originals.let_go()
        stage("follow")
        pairs = ((part, kept.at(entry.first, part), inputs, mask) for part, inputs, mask in rows.at(entry, quantized))
        paired, checked = observe_pair(context, entry, pairs, own, observed.token_weight, rows.batch_bytes), None
        if context.recipe.propagation == AUTO and held_out is not None and held_out.quantized is not None:
            original = StoppedRows(context, held_out.original, wait=False).at(entry, {})
            reached = StoppedRows(context, held_out.quantized, wait=False).at(entry, quantized)
            both = (
                (part, inputs, met, mask) for (part, inputs, mask), (_, met, _) in zip(original, reached, strict=True)
            )
            checked = observe_pair(context, entry, both, held_out.original.own, reserved=rows.batch_bytes)
        stage("search")
        return propagated_evidence(paired, checked, readers, choices, for_others=for_others)

    return evidence


def check_held_out(
    context: BlockContext, stream: Stream, choices: tuple[Mapping[str, QuantizedLinear | RestoredLinear], ...]
) -> tuple[tuple[float, ...], list[HiddenStates]]:
    """For each choice of what stands for linears: ‖Y−Ŷ‖² / ‖Y−X‖² of the block's output on held-out rows.

    The original rows move on to Y.
    Ŷ is computed from what the block will really get: the quantized stream's rows where there are any; then it is the
    second result, for each choice.
    """
    outputs = [] if stream.quantized is None else [stream.quantized.copy() for _ in choices]
    entered = (stream.quantized or stream.original).batches(context.index)
    original = stream.original.batches(context.index)
    both = ((part, *rest, *second) for (part, *rest), second in zip(original, entered, strict=True))
    watches = [weights_replaced(context, choice) for choice in choices]
    own: list[list[Tensor]] = []  # of each part the sums of its batches
    for batches in by_part(both, stream.original.own.ends):
        own.append([])
        for part, hidden, call, mask, _, reached, own_call, _ in batches:
            with torch.no_grad():
                output, beside = hand_on(context.block, hidden, call)
                of_batch = [_summed_squares(output - hidden, mask)]
                for position, watch in enumerate(watches):
                    with watch:
                        found = hand_on(context.block, reached, own_call)
                    if outputs:
                        outputs[position].write(part, *found)
                    of_batch.append(_summed_squares(found.hidden - output, mask))
            stream.original.write(part, output, beside)
            own[-1].append(torch.stack(of_batch))
    told = iter(torch.stack([sums for part in own for sums in part]).tolist() if any(own) else ())  # waits only once
    none = [0.0] * (1 + len(choices))
    parts = (reduce(_added, (next(told) for _ in part), none) for part in own)
    contribution, *totals = summed_numbers(context.ranks, parts)
    return tuple(total / max(contribution, torch.finfo(torch.float32).tiny) for total in totals), outputs


def _summed_squares(difference: Tensor, mask: Tensor | None) -> Tensor:
    """Over `[rows, tokens, ...]`, padding left out."""
    return (difference if mask is None else difference[mask]).square().sum()


def _added(first: list[float], second: list[float]) -> list[float]:
    return [one + other for one, other in zip(first, second, strict=True)]


def _result(
    context: BlockContext,
    choice: Choice,
    refused: Sequence[FoldDecision],
    errors: tuple[float, ...] | None = None,
    fallback: str | None = None,
    statistics: BlockStatistics | None = None,
) -> BlockResult:
    stored = {name: value for entry in choice.folds for name, value in entry.stored.items()}
    for view in context.structure.linears:
        if context.kept(view.name):
            stored[view.weight] = view.oriented(choice.scaled[view.name].weight).contiguous()
    kept = [
        KeptDecision(plan.name, plan.shape, plan.keep)
        for plan in context.block_plan.linears.values()
        if plan.keep is not None
    ]
    for name in context.structure.unwatched:
        shape = tuple(context.parameters[name].shape)
        kept.append(KeptDecision(f"{context.block_plan.path}.{name}", shape, _UNWATCHED.get(len(shape), _STACKED)))
    decision = BlockDecision(
        index=context.index,
        path=context.block_plan.path,
        folds=(*(entry.decision for entry in choice.folds), *refused),
        linears=tuple(
            linear.decision if statistics is None else _with_tokens(context, name, linear.decision, statistics)
            for name, linear in choice.quantized.items()
        ),
        kept=tuple(kept),
        held_out_error_nearest=None if errors is None else errors[0],
        held_out_error=None if errors is None else errors[1],
        fallback=fallback,
    )
    return BlockResult({name: linear.quantized for name, linear in choice.quantized.items()}, stored, decision)
