"""One block, from weights in memory to packed codes and stored values, in named steps. It holds no formula.

prove     every fold of this kind, on this block's real weights
observe   one pass over the calibration rows: statistics of every input, and the next block's inputs
search    a channel scale per fold, codes for every linear in order of data flow, folds that did harm undone
check     held-out rows: the block as chosen against the block plainly rounded
advance   with propagation: the quantized stream moves on
store     the values of everything that goes to disk
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from awqkit.decisions import BlockDecision, FoldDecision, KeptDecision
from awqkit.methods.evidence import Evidence, propagated_evidence
from awqkit.methods.linear import QuantizedLinear
from awqkit.model.skeleton import run_block
from awqkit.model.structure import LinearInput
from awqkit.numerics.grid import QuantizedWeight
from awqkit.pipeline.activations import HiddenStates
from awqkit.pipeline.context import BlockContext, Stream, Streams
from awqkit.pipeline.observe_block import (
    measure_row_weights,
    observe,
    observe_pair,
    prove_folds,
    refuse_non_finite,
)
from awqkit.pipeline.quantized_block import advance, weights_replaced
from awqkit.pipeline.search_block import (
    Choice,
    EvidenceOf,
    Measured,
    choose,
    choose_plainly,
    metric_choices,
    original_evidences,
    readers_of,
)
from awqkit.pipeline.sensitivity import measure_sensitivity
from awqkit.recipe import AUTO

Stage = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class BlockResult:
    """What one block leaves behind.

    quantized: linear name inside the block -> codes. stored: parameter name inside the block -> its new value where it
    differs from the source's, float32.
    """

    quantized: Mapping[str, QuantizedWeight]
    stored: Mapping[str, Tensor]
    decision: BlockDecision


def quantize_block(context: BlockContext, streams: Streams | None, stage: Stage) -> BlockResult:
    """All steps for one block; without streams (a recipe that looks at no text) it is rounded plainly."""
    refuse_non_finite(context)
    if streams is None:
        stage("round")
        return _result(context, choose_plainly(context, {}), [])
    stage("prove")
    searching = context.recipe.channel_scale != "none"
    folds, refused = prove_folds(context, streams.probe) if searching else ([], [])
    stage("observe")
    token_weight = None if streams.gradients is None else streams.gradients.token_weight(context.index)
    inputs = streams.calibration.original.copy() if _needs_inputs_again(streams) else streams.calibration.original
    measured = _measure(context, streams, inputs, token_weight)
    originals = original_evidences(context, measured)
    evidence_of = _evidence_of(context, streams, measured, originals, inputs, token_weight)
    stage("search")
    choice = choose(context, folds, measured, originals, evidence_of)
    fallback, errors = None, None
    if streams.held_out is not None:
        stage("check")
        plain = choose_plainly(context, originals)
        errors = held_out_errors(context, streams.held_out, (plain, choice))
        if errors[1] > errors[0]:
            fallback = (
                f"held-out rows were worse than with plain rounding ({errors[1]:.3e} > {errors[0]:.3e}): "
                "block rounded plainly"
            )
            undone = [replace(entry.decision, fallback=entry.decision.fallback or fallback) for entry in choice.folds]
            choice, refused, errors = plain, [*refused, *undone], (errors[0], errors[0])
    _advance_quantized(context, streams, choice, stage)
    return _result(context, choice, refused, errors, fallback)


def _measure(
    context: BlockContext, streams: Streams, inputs: HiddenStates, token_weight: Tensor | None
) -> Measured:
    """Row weights and statistics; the original stream of the calibration rows moves on to the block's output."""
    row_weights: Mapping[str, Tensor] = {}
    if streams.gradients is not None:
        row_weights = measure_sensitivity(context, inputs, streams.gradients.at(context.index))
        advance(context, streams.probe, {})
    elif context.recipe.channel_scale != "none" or context.recipe.column_order == "energy":
        row_weights = measure_row_weights(context, streams.probe)
    return Measured(observe(context, streams.calibration.original, token_weight), row_weights)


def _needs_inputs_again(streams: Streams) -> bool:
    return streams.calibration.quantized is not None


def _evidence_of(
    context: BlockContext,
    streams: Streams,
    measured: Measured,
    originals: Mapping[str, Evidence],
    inputs: HiddenStates,
    token_weight: Tensor | None,
) -> EvidenceOf:
    """Without propagation the original stream's evidence; with it both streams are run up to the input in question."""
    quantized_stream = streams.calibration.quantized
    if quantized_stream is None:
        return lambda entry, quantized: originals[entry.first]
    calibration = Stream(inputs, quantized_stream)

    def evidence(entry: LinearInput, quantized: Mapping[str, QuantizedLinear]) -> Evidence:
        paired = observe_pair(context, calibration, entry, quantized, token_weight)
        held_out = None
        if context.recipe.propagation == AUTO and streams.held_out is not None:
            held_out = observe_pair(context, streams.held_out, entry, quantized)
        return propagated_evidence(
            paired, held_out, readers_of(context, entry, measured), metric_choices(context.recipe)
        )

    return evidence


def _advance_quantized(context: BlockContext, streams: Streams, choice: Choice, stage: Stage) -> None:
    stage("advance")
    for stream in (streams.calibration, streams.held_out):
        if stream is not None and stream.quantized is not None:
            advance(context, stream.quantized, choice.quantized)


def held_out_errors(context: BlockContext, stream: Stream, choices: tuple[Choice, ...]) -> tuple[float, ...]:
    """For each choice ‖Y−Ŷ‖² / ‖Y−X‖² of the block's output on held-out rows, of which the original ones move on to Y.

    Ŷ is computed from what the block will really get: the quantized stream's rows where there are any.
    """
    totals, contribution = [0.0] * len(choices), 0.0
    entered = (stream.quantized or stream.original).batches(context.index)
    for (part, hidden, call, mask), (_, reached, _, _) in zip(
        stream.original.batches(context.index), entered, strict=True
    ):
        real = ... if mask is None else mask
        with torch.no_grad():
            output = run_block(context.block, hidden, call)
            contribution += float((output - hidden)[real].square().sum())
            for position, choice in enumerate(choices):
                with weights_replaced(context, choice.quantized):
                    change = run_block(context.block, reached, call) - output
                totals[position] += float(change[real].square().sum())
        stream.original.write(part, output)
    return tuple(total / max(contribution, torch.finfo(torch.float32).tiny) for total in totals)


def _result(
    context: BlockContext,
    choice: Choice,
    refused: list[FoldDecision],
    errors: tuple[float, ...] | None = None,
    fallback: str | None = None,
) -> BlockResult:
    stored = {name: value for entry in choice.folds for name, value in entry.stored.items()}
    for view in context.structure.linears:
        if context.kept(view.name):
            stored[view.weight] = choice.scaled[view.name].weight
    kept = [
        KeptDecision(plan.name, plan.shape, plan.keep)
        for plan in context.block_plan.linears.values()
        if plan.keep is not None
    ]
    for name in context.structure.unwatched:
        shape = tuple(context.parameters[name].shape)
        kept.append(
            KeptDecision(
                f"{context.block_plan.path}.{name}", shape, "not called exactly once as a linear in this block"
            )
        )
    decision = BlockDecision(
        index=context.index,
        path=context.block_plan.path,
        folds=(*(entry.decision for entry in choice.folds), *refused),
        linears=tuple(linear.decision for linear in choice.quantized.values()),
        kept=tuple(kept),
        held_out_error_nearest=None if errors is None else errors[0],
        held_out_error=None if errors is None else errors[1],
        fallback=fallback,
    )
    return BlockResult({name: linear.quantized for name, linear in choice.quantized.items()}, stored, decision)
