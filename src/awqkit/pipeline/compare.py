"""Several recipes on one model in one pass over its blocks; nothing is written, and one block at a time has weights.

Each block is read once and, for every kind of statistics, observed once on the original stream. Then each recipe
quantizes it with streams of its own, and its evaluation rows move on through the block as it quantized it. After the
last block these are what the output head reads. Recipes that tune go through all their blocks once more at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from awqkit.events import BlockFinished, Caution, Emit, TaskAdvanced, TaskFinished, TaskStarted
from awqkit.kernels.precision import full_precision, tensor_cores
from awqkit.methods.tuning import TunableGain, TunableLinear
from awqkit.model.block_calls import hand_on
from awqkit.model.skeleton import Skeleton
from awqkit.numerics.grid import QuantizedWeight
from awqkit.pipeline.across_blocks import AcrossBlocks
from awqkit.pipeline.activations import HiddenStates, TokenRows
from awqkit.pipeline.block_memory import block_memory, fitting_experts
from awqkit.pipeline.block_step import (
    BlockResult,
    Observed,
    observe_block,
    prove_block,
    quantize_observed,
    round_block,
)
from awqkit.pipeline.context import BlockContext, Stream, Streams
from awqkit.pipeline.free_memory import free_bytes
from awqkit.pipeline.observe_block import refuse_non_finite
from awqkit.pipeline.plan import RunPlan
from awqkit.pipeline.quantized_block import advance
from awqkit.pipeline.ranks import Ranks
from awqkit.pipeline.row_parts import copies_of_sums
from awqkit.pipeline.search_block import Choice
from awqkit.pipeline.stage_clock import StageClock
from awqkit.pipeline.start_streams import start_streams
from awqkit.pipeline.tunable_block import TunableBlock
from awqkit.pipeline.tuning_stage import TuningStart, finish_tuning, start_tuning, tunable_block, why_not_tuned
from awqkit.recipe import Recipe

_TASK, _GRADIENT_TASK = "block", "gradient step"
START, OBSERVE, EVALUATE = "start", "observe", "evaluate"  # stages that no contender has alone

_Kind = tuple[str, tuple[float, float]]  # what recipes that share streams and statistics have in common: see `_kind`
_TuningKind = tuple[str, tuple[float, float]]  # and those that start tuning from the same rows in the same batches


@dataclass(frozen=True, slots=True)
class Contender:
    """One recipe with its plan. label: unlike every other's."""

    label: str
    recipe: Recipe
    plan: RunPlan


@dataclass(frozen=True, slots=True)
class LearningRows:
    """Token rows for the statistics, and for the check on held-out ones, None where there are none."""

    calibration: TokenRows
    held_out: TokenRows | None


@dataclass(frozen=True, slots=True)
class CompareRows:
    """Token rows to evaluate, and by `Recipe.own_text` those that such recipes learn from."""

    learning: Mapping[tuple[float, float], LearningRows]
    evaluation: TokenRows


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


@dataclass(slots=True)
class _Lane:
    """A contender's way through the model. streams: its kind's, None without calibration.

    calibration, held_out: its quantized streams, None where it does not propagate. tunes: afterwards, on all its
    blocks. blocks: as quantized so far, where it does.
    """

    contender: Contender
    evaluation: HiddenStates
    streams: Streams | None
    calibration: HiddenStates | None = None
    held_out: HiddenStates | None = None
    tunes: bool = False
    blocks: list[TunableBlock] = field(default_factory=list)
    num_fallbacks: int = 0


@dataclass(frozen=True, slots=True)
class _Course:
    """What the whole pass shares. streams: by kind of recipe. tuning: by `_tuning_kind`.

    experts_at_once: see `BlockContext`.
    """

    skeleton: Skeleton
    device: torch.device
    lanes: tuple[_Lane, ...]
    streams: Mapping[_Kind, Streams]
    original: HiddenStates
    tuning: Mapping[_TuningKind, TuningStart]
    clock: StageClock
    experts_at_once: int | None
    across: AcrossBlocks = field(default_factory=AcrossBlocks)


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
        course = _course(skeleton, contenders, rows, device, clock, emit)
        emit(TaskStarted(_TASK, skeleton.num_blocks))
        for index in range(skeleton.num_blocks):
            started, before = time.monotonic(), sum(lane.num_fallbacks for lane in course.lanes)
            clock.enter(OBSERVE)
            block = skeleton.load_block(index, device)
            try:
                _one_block(course, block, index, lambda detail, index=index: emit(TaskAdvanced(_TASK, index, detail)))
            finally:
                skeleton.release_block(index)
            undone = sum(lane.num_fallbacks for lane in course.lanes) - before
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


def _course(
    skeleton: Skeleton,
    contenders: Sequence[Contender],
    rows: CompareRows,
    device: torch.device,
    clock: StageClock,
    emit: Emit,
) -> _Course:
    streams: dict[_Kind, Streams] = {}
    num_streams = 2 * len(contenders) + 4  # calibration and evaluation rows of each, and the original's
    for recipe in (contender.recipe for contender in contenders):
        if recipe.needs_calibration and _kind(recipe) not in streams:
            learning = rows.learning[recipe.own_text]
            streams[_kind(recipe)] = _shared_streams(skeleton, recipe, learning, device, num_streams, clock, emit)
    original = HiddenStates(skeleton, rows.evaluation, device, num_streams=num_streams)
    lanes = tuple(_lane(contender, streams, original) for contender in contenders)
    for lane in lanes:
        _settle_tuning(lane, device, emit)
    tuning, tuned = {}, [lane.contender.recipe for lane in lanes if lane.tunes]
    for kind in set(map(_tuning_kind, tuned)):
        moves, own_text = kind
        learning = rows.learning[own_text]
        epochs = {recipe.tuning_epochs for recipe in tuned if _tuning_kind(recipe) == kind}
        tuning[kind] = start_tuning(skeleton, moves, epochs, learning.calibration, learning.held_out, device)
    at_once = _experts_at_once(skeleton, contenders, device)
    return _Course(skeleton, device, lanes, streams, original, tuning, clock, at_once)


def _experts_at_once(skeleton: Skeleton, contenders: Sequence[Contender], device: torch.device) -> int | None:
    """As few as suit the contender that needs the most of them."""
    free, copies = free_bytes(device), copies_of_sums(Ranks.alone(device))
    memories = [block_memory(skeleton, each.plan, each.recipe) for each in contenders if each.recipe.needs_calibration]
    found = [fitting_experts(memory, free, copies) for memory in memories]
    return min((each for each in found if each is not None), default=None)


def _shared_streams(
    skeleton: Skeleton,
    recipe: Recipe,
    rows: LearningRows,
    device: torch.device,
    num_streams: int,
    clock: StageClock,
    emit: Emit,
) -> Streams:
    """The original streams for all recipes of this one's kind; quantized ones belong to the lanes."""
    alone = replace(recipe, propagation=0.0)
    if recipe.sensitivity == "none":
        return start_streams(skeleton, alone, rows.calibration, rows.held_out, device, lambda index: None, num_streams)
    steps = 2 * skeleton.num_blocks - 1  # there, and back to the second block
    done = 0

    def step(index: int) -> None:
        nonlocal done
        done += 1
        emit(TaskAdvanced(_GRADIENT_TASK, done))

    clock.enter(recipe.sensitivity)
    emit(TaskStarted(_GRADIENT_TASK, steps))
    streams = start_streams(skeleton, alone, rows.calibration, rows.held_out, device, step, num_streams)
    emit(TaskFinished(_GRADIENT_TASK))
    clock.enter(START)
    return streams


def _lane(contender: Contender, streams: Mapping[_Kind, Streams], original: HiddenStates) -> _Lane:
    recipe = contender.recipe
    if not recipe.needs_calibration:
        return _Lane(contender, original.copy(), None)
    shared = streams[_kind(recipe)]
    lane = _Lane(contender, original.copy(), shared)
    if recipe.propagates:
        lane.calibration = shared.calibration.original.copy()
        lane.held_out = None if shared.held_out is None else shared.held_out.original.copy()
    return lane


def _settle_tuning(lane: _Lane, device: torch.device, emit: Emit) -> None:
    recipe = lane.contender.recipe
    if lane.streams is None or recipe.tuning_epochs <= 0:
        return
    no_room = why_not_tuned(recipe, lane.contender.plan, device)
    if no_room is not None:
        emit(Caution(f"{lane.contender.label}: {no_room}"))
        lane.num_fallbacks += 1
    lane.tunes = no_room is None


def _one_block(course: _Course, block: nn.Module, index: int, tell: Callable[[str], None]) -> None:
    """Every stream, of every lane, moves on to the block's output."""
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
    observed: dict[_Kind, Observed] = {}
    for kind, streams in course.streams.items():
        of_kind = [context for context in contexts if _is_of_kind(context.recipe, kind)]
        observed[kind] = observe_block(of_kind[0], streams, [context.recipe for context in of_kind])
    for lane, context, proof in zip(course.lanes, contexts, proofs, strict=True):
        course.clock.enter(lane.contender.label)
        if proof is None:
            tell(f"{lane.contender.label}: round")
            choice, result = round_block(context)
        else:
            choice, result = quantize_observed(
                context,
                proof,
                observed[_kind(context.recipe)],
                lane.calibration,
                _held_out(lane),
                lambda stage, label=lane.contender.label: tell(f"{label}: {stage}"),
            )
        _take(course, lane, context, choice, result)
    for states in (course.original, *(each.held_out.original for each in course.streams.values() if each.held_out)):
        _run_original(block, index, states)


def _kind(recipe: Recipe) -> _Kind:
    return recipe.sensitivity, recipe.own_text


def _tuning_kind(recipe: Recipe) -> _TuningKind:
    return recipe.tuning, recipe.own_text


def _is_of_kind(recipe: Recipe, kind: _Kind) -> bool:
    return recipe.needs_calibration and _kind(recipe) == kind


def _held_out(lane: _Lane) -> Stream | None:
    """A copy for the check, which moves it, as every other lane's check does with its own."""
    if lane.streams is None or lane.streams.held_out is None:
        return None
    return Stream(lane.streams.held_out.original.copy(), lane.held_out)


def _take(course: _Course, lane: _Lane, context: BlockContext, choice: Choice, result: BlockResult) -> None:
    """The lane goes on with the block as it was quantized; where it tunes, its evaluation rows wait for that."""
    lane.num_fallbacks += result.decision.num_fallbacks
    if lane.tunes:
        lane.blocks.append(tunable_block(context, result))
        return
    course.clock.enter(EVALUATE)
    with full_precision():
        advance(context, lane.evaluation, choice.quantized)


def _run_original(block: nn.Module, index: int, states: HiddenStates) -> None:
    with torch.no_grad(), full_precision():
        for part, hidden, call, _ in states.batches(index):
            states.write(part, *hand_on(block, hidden, call))


def _tune(course: _Course, lane: _Lane, emit: Emit) -> None:
    """Tune the lane's blocks together and take its evaluation rows through them."""
    contender = lane.contender
    course.clock.enter(contender.label)
    assert lane.streams is not None
    decision, moved = finish_tuning(
        course.skeleton,
        contender.recipe,
        contender.plan.stored_dtype,
        course.tuning[_tuning_kind(contender.recipe)],
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
