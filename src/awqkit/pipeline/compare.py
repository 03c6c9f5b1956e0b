"""Several recipes on one model in one pass over its blocks; nothing is written, and one block at a time has weights.

Each block is read once and, for every kind of statistics, observed once on the original stream. Then each recipe
quantizes it with streams of its own, and its evaluation rows move on through the block as it quantized it. After the
last block these are what the output head reads. Recipes that tune go through all their blocks once more at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from awqkit.events import BlockFinished, Emit, TaskAdvanced, TaskFinished, TaskStarted
from awqkit.kernels.precision import full_precision, tensor_cores
from awqkit.methods.tuning import TunableGain, TunableLinear
from awqkit.model.block_calls import hand_on
from awqkit.model.skeleton import Skeleton
from awqkit.numerics.grid import QuantizedWeight
from awqkit.pipeline.activations import HiddenStates
from awqkit.pipeline.block_step import (
    BlockResult,
    Observed,
    observe_block,
    prove_block,
    quantize_observed,
    round_block,
)
from awqkit.pipeline.context import BlockContext, Stream
from awqkit.pipeline.course import (
    START,
    CompareRows,
    Contender,
    Course,
    Kind,
    Lane,
    begun,
    is_of_kind,
    kind_of,
    tuning_kind_of,
)
from awqkit.pipeline.observe_block import refuse_non_finite
from awqkit.pipeline.quantized_block import advance
from awqkit.pipeline.ranks import Ranks
from awqkit.pipeline.search_block import Choice
from awqkit.pipeline.smaller_batches import begin_block, halve, no_room, run_again
from awqkit.pipeline.stage_clock import StageClock
from awqkit.pipeline.tunable_block import TunableBlock
from awqkit.pipeline.tuning_stage import finish_tuning, tunable_block

_TASK = "block"
OBSERVE, EVALUATE = "observe", "evaluate"  # stages that no contender has alone, beside START


@dataclass(frozen=True, slots=True)
class Compared:
    """The evaluation rows after the last block.

    original: of the model as it is. reached: of each contender. seconds: each contender's own. shared_seconds: by
    stage, what served several. num_fallbacks: how many choices of each contender were undone.
    """

    original: HiddenStates
    reached: tuple[HiddenStates, ...]
    seconds: tuple[float, ...]
    shared_seconds: dict[str, float]
    num_fallbacks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Took:
    """What a lane took from a block. block: for tuning, None where its evaluation rows went on already."""

    num_fallbacks: int
    block: TunableBlock | None = None


def compare_recipes(
    skeleton: Skeleton, contenders: Sequence[Contender], rows: CompareRows, device: torch.device, emit: Emit
) -> Compared:
    """Take the evaluation rows through the model as it is, and as each contender quantizes it.

    The contenders agree in seed and in what `plan_linears` started from. Raises CheckpointError where a tensor of a
    block holds NaN or inf.
    """
    clock = StageClock()
    clock.enter(START)
    with tensor_cores(device):
        course = begun(skeleton, contenders, rows, device, clock, emit)
        emit(TaskStarted(_TASK, skeleton.num_blocks))
        for index in range(skeleton.num_blocks):
            started = time.monotonic()
            clock.enter(OBSERVE)
            undone = _one_block(course, index, emit)
            emit(BlockFinished(index, skeleton.num_blocks, time.monotonic() - started, None, None, undone))
            emit(TaskAdvanced(_TASK, index + 1))
        emit(TaskFinished(_TASK))
        course.across.let_go(emit)
        for lane in course.lanes:
            if lane.tunes:
                _tune(course, lane, emit)
    clock.enter("")
    own = {lane.contender.label for lane in course.lanes}
    return Compared(
        course.original,
        tuple(lane.evaluation for lane in course.lanes),
        tuple(clock.seconds[lane.contender.label] for lane in course.lanes),
        {stage: seconds for stage, seconds in clock.seconds.items() if stage not in own},
        tuple(lane.num_fallbacks for lane in course.lanes),
    )


def _one_block(course: Course, index: int, emit: Emit) -> int:
    """Every stream, of every lane, moves on to the block's output; how many choices were undone."""
    skeleton, device, moving = course.skeleton, course.device, course.moving
    path = course.lanes[0].contender.plan.blocks[index].path

    def through() -> list[_Took]:
        begin_block(moving, device)
        block = skeleton.load_block(index, device)
        return _through(course, block, index, lambda detail: emit(TaskAdvanced(_TASK, index, detail)))

    def smaller() -> int:
        skeleton.release_block(index)
        course.across.replays.let_go()
        if not halve(moving, skeleton):
            raise no_room(path, course.memory, course.original.shape[1], device)
        return course.original.tokens_per_batch

    try:
        took = run_again(through, smaller, path, device, emit)
    finally:
        skeleton.release_block(index)
    for lane, each in zip(course.lanes, took, strict=True):
        lane.num_fallbacks += each.num_fallbacks
        if each.block is not None:
            lane.blocks.append(each.block)
    return sum(each.num_fallbacks for each in took)


def _through(course: Course, block: nn.Module, index: int, tell: Callable[[str], None]) -> list[_Took]:
    """A block that is in memory, for every lane; none of them keeps anything of it yet."""
    parameters = {name: value.data for name, value in block.named_parameters()}
    contexts = []
    for lane in course.lanes:
        plan, recipe = lane.contender.plan, lane.contender.recipe
        alone = Ranks.alone(course.device)
        contexts.append(
            BlockContext(
                course.skeleton,
                plan,
                plan.blocks[index],
                recipe,
                block,
                parameters,
                alone,
                experts_at_once=course.experts_at_once,
                across=course.across,
            )
        )
    refuse_non_finite(contexts[0])
    tell("observe")
    proofs = [
        None if lane.streams is None else prove_block(context, lane.streams.probe)
        for lane, context in zip(course.lanes, contexts, strict=True)
    ]
    observed: dict[Kind, Observed] = {}
    for kind, streams in course.streams.items():
        of_kind = [context for context in contexts if is_of_kind(context.recipe, kind)]
        observed[kind] = observe_block(of_kind[0], streams, [context.recipe for context in of_kind])
    took = []
    for lane, context, proof in zip(course.lanes, contexts, proofs, strict=True):
        course.clock.enter(lane.contender.label)
        if proof is None:
            tell(f"{lane.contender.label}: round")
            choice, result = round_block(context)
        else:
            choice, result = quantize_observed(
                context,
                proof,
                observed[kind_of(context.recipe)],
                lane.calibration,
                _held_out(lane),
                lambda stage, label=lane.contender.label: tell(f"{label}: {stage}"),
            )
        took.append(_take(course, lane, context, choice, result))
    for states in (course.original, *(each.held_out.original for each in course.streams.values() if each.held_out)):
        _run_original(block, index, states)
    return took


def _held_out(lane: Lane) -> Stream | None:
    """A copy for the check, which moves it, as every other lane's check does with its own."""
    if lane.streams is None or lane.streams.held_out is None:
        return None
    return Stream(lane.streams.held_out.original.copy(), lane.held_out)


def _take(course: Course, lane: Lane, context: BlockContext, choice: Choice, result: BlockResult) -> _Took:
    """The lane goes on with the block as it was quantized; where it tunes, its evaluation rows wait for that."""
    num_fallbacks = result.decision.num_fallbacks
    if lane.tunes:
        return _Took(num_fallbacks, tunable_block(context, result))
    course.clock.enter(EVALUATE)
    with full_precision():
        advance(context, lane.evaluation, choice.quantized)
    return _Took(num_fallbacks)


def _run_original(block: nn.Module, index: int, states: HiddenStates) -> None:
    with torch.no_grad(), full_precision():
        for part, hidden, call, _ in states.batches(index):
            states.write(part, *hand_on(block, hidden, call))


def _tune(course: Course, lane: Lane, emit: Emit) -> None:
    """Tune the lane's blocks together and take its evaluation rows through them."""
    contender = lane.contender
    course.clock.enter(contender.label)
    assert lane.streams is not None
    decision, moved = finish_tuning(
        course.skeleton,
        contender.recipe,
        contender.plan.stored_dtype,
        course.tuning[tuning_kind_of(contender.recipe)],
        lane.streams,
        lane.blocks,
        emit,
    )
    lane.num_fallbacks += decision.fallback is not None
    course.clock.enter(EVALUATE)
    with torch.no_grad(), full_precision():
        for index, block in enumerate(_as_tuned(lane.blocks, moved)):
            for part, hidden, call, _ in lane.evaluation.batches(index):
                lane.evaluation.write(part, *block(hidden, call))


def _as_tuned(
    blocks: Sequence[TunableBlock], moved: Sequence[tuple[Mapping[str, QuantizedWeight], Mapping[str, Tensor]]]
) -> Iterator[TunableBlock]:
    """The blocks with what moved rounded as it is stored; what did not move is as it was."""
    for block, (weights, gains) in zip(blocks, moved, strict=True):
        linears = {
            name: TunableLinear(weights[view.name], "groups", transposed=view.transposed)
            for name, view in block.views.items()
            if view.name in weights
        }
        vectors = {name: TunableGain.of(value, is_offset=False) for name, value in gains.items()}
        yield replace(block, linears={**block.linears, **linears}, gains={**block.gains, **vectors})
