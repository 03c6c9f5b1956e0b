"""One block, from weights in memory to packed codes and stored values, in named steps. It holds no formula.

prove     every fold of this kind, on this block's real weights
observe   one pass over the calibration rows: statistics of every input, and the next block's inputs
search    a channel scale per fold, codes for every linear, folds that did harm undone
check     held-out rows: the block as chosen against the block plainly rounded
store     the values of everything that goes to disk
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from awqkit.decisions import BlockDecision, FoldDecision, KeptDecision
from awqkit.model.skeleton import run_block
from awqkit.numerics.grid import QuantizedWeight
from awqkit.numerics.statistics import second_moment
from awqkit.pipeline.activations import HiddenStates
from awqkit.pipeline.context import BlockContext, Streams
from awqkit.pipeline.observe_block import measure_row_weights, observe, prove_folds, refuse_non_finite
from awqkit.pipeline.search_block import Choice, choose, choose_plainly

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
    row_weights = measure_row_weights(context, streams.probe) if searching else {}
    statistics = observe(context, streams.calibration)
    stage("search")
    moments = {first: second_moment(found) for first, found in statistics.items()}
    choice = choose(context, folds, statistics, moments, row_weights)
    if streams.held_out is None:
        return _result(context, choice, refused)
    stage("check")
    plain = choose_plainly(context, moments)
    errors = held_out_errors(context, streams.held_out, (plain, choice))
    if errors[1] <= errors[0]:
        return _result(context, choice, refused, errors)
    reason = (
        f"held-out rows were worse than with plain rounding ({errors[1]:.3e} > {errors[0]:.3e}): block rounded plainly"
    )
    undone = [replace(entry.decision, fallback=entry.decision.fallback or reason) for entry in choice.folds]
    return _result(context, plain, [*refused, *undone], (errors[0], errors[0]), reason)


def held_out_errors(context: BlockContext, rows: HiddenStates, choices: tuple[Choice, ...]) -> tuple[float, ...]:
    """For each choice ‖Y−Ŷ‖² / ‖Y−X‖² of the block's output on held-out rows, which then move on to Y."""
    totals, contribution = [0.0] * len(choices), 0.0
    for part, hidden, call, mask in rows.batches(context.index):
        real = ... if mask is None else mask
        with torch.no_grad():
            output = run_block(context.block, hidden, call)
            contribution += float((output - hidden)[real].square().sum())
            for position, choice in enumerate(choices):
                with _weights_replaced(context, choice):
                    change = run_block(context.block, hidden, call) - output
                totals[position] += float(change[real].square().sum())
        rows.write(part, output)
    return tuple(total / max(contribution, torch.finfo(torch.float32).tiny) for total in totals)


@contextmanager
def _weights_replaced(context: BlockContext, choice: Choice) -> Iterator[None]:
    """Inside, the block computes with the quantized weights in the original's units: the folded model's function."""
    parameters = dict(context.block.named_parameters())
    try:
        for name, linear in choice.quantized.items():
            parameters[context.structure.linear(name).weight].data = linear.restored
        yield
    finally:
        for name in choice.quantized:
            weight = context.structure.linear(name).weight
            parameters[weight].data = context.parameters[weight]


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
