"""Several recipes on their way through one model: what they share, and the lane of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from awqkit.events import Caution, Emit, TaskAdvanced, TaskFinished, TaskStarted
from awqkit.model.skeleton import Skeleton
from awqkit.pipeline.across_blocks import AcrossBlocks
from awqkit.pipeline.activations import HiddenStates, TokenRows
from awqkit.pipeline.block_memory import BlockMemory, block_memory, fitting_experts, fitting_tokens
from awqkit.pipeline.context import Streams
from awqkit.pipeline.free_memory import free_bytes
from awqkit.pipeline.plan import RunPlan
from awqkit.pipeline.ranks import Ranks
from awqkit.pipeline.row_parts import copies_of_sums
from awqkit.pipeline.smaller_batches import no_room, run_again
from awqkit.pipeline.stage_clock import StageClock
from awqkit.pipeline.start_streams import start_streams
from awqkit.pipeline.tunable_block import TunableBlock
from awqkit.pipeline.tuning_stage import TuningStart, start_tuning, why_not_tuned
from awqkit.recipe import Recipe

START = "start"  # a stage that no contender has alone
_GRADIENT_TASK = "gradient step"

Kind = tuple[str, tuple[float, float]]  # what recipes that share streams and statistics have in common: see `kind_of`
TuningKind = tuple[str, tuple[float, float]]  # and those that start tuning from the same rows in the same batches


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


@dataclass(slots=True)
class Lane:
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
class Course:
    """What the whole pass shares. streams: by kind of recipe. tuning: by `tuning_kind_of`.

    memory: what the contender that needs the most of it needs in a block. experts_at_once: see `BlockContext`.
    """

    skeleton: Skeleton
    device: torch.device
    lanes: tuple[Lane, ...]
    streams: Mapping[Kind, Streams]
    original: HiddenStates
    tuning: Mapping[TuningKind, TuningStart]
    clock: StageClock
    memory: BlockMemory
    experts_at_once: int | None
    across: AcrossBlocks = field(default_factory=AcrossBlocks)

    @property
    def moving(self) -> list[HiddenStates]:
        """All that moves from block to block."""
        found = [self.original, *(states for each in self.streams.values() for states in each.named.values())]
        for lane in self.lanes:
            found += filter(None, (lane.evaluation, lane.calibration, lane.held_out))
        return found


def begun(
    skeleton: Skeleton,
    contenders: Sequence[Contender],
    rows: CompareRows,
    device: torch.device,
    clock: StageClock,
    emit: Emit,
) -> Course:
    """All streams before the first block, in batches that fit the contender that needs the most memory."""
    free = free_bytes(device)
    at_once = _experts_at_once(skeleton, contenders, free, Ranks.alone(device))
    needed = [block_memory(skeleton, each.plan, each.recipe, at_once) for each in contenders]
    memory = max(needed, key=lambda each: each.fixed)
    tokens = min(fitting_tokens(each, device, free) for each in needed)
    everything = rows.evaluation, *(each.calibration for each in rows.learning.values())
    length = max(each.ids.shape[1] for each in everything)

    def begin() -> Course:
        return _course(skeleton, contenders, rows, device, clock, emit, tokens, memory, at_once)

    def smaller() -> int:
        nonlocal tokens
        if tokens <= length:
            raise no_room("the model", memory, length, device)
        tokens //= 2
        return max(tokens, length)

    return run_again(begin, smaller, "hidden states before the first block", device, emit)


def _course(
    skeleton: Skeleton,
    contenders: Sequence[Contender],
    rows: CompareRows,
    device: torch.device,
    clock: StageClock,
    emit: Emit,
    tokens_per_batch: int,
    memory: BlockMemory,
    experts_at_once: int | None,
) -> Course:
    streams: dict[Kind, Streams] = {}
    num_streams = 2 * len(contenders) + 4  # calibration and evaluation rows of each, and the original's
    reserved = memory.with_tokens(tokens_per_batch)
    recipes = [contender.recipe for contender in contenders if contender.recipe.needs_calibration]
    for kind in dict.fromkeys(map(kind_of, recipes)):
        alike = [recipe for recipe in recipes if kind_of(recipe) == kind]
        recipe = next((each for each in alike if each.looks_across_groups), alike[0])  # see `learnt_rows`
        learning = rows.learning[recipe.own_text]
        start = partial(
            start_streams,
            skeleton,
            replace(recipe, propagation=0.0),  # quantized streams belong to the lanes
            learning.calibration,
            learning.held_out,
            device,
            num_streams=num_streams,
            tokens_per_batch=tokens_per_batch,
            reserved=reserved,
        )
        streams[kind] = _shared_streams(start, recipe, 2 * skeleton.num_blocks - 1, clock, emit)
    original = HiddenStates(
        skeleton,
        rows.evaluation,
        device,
        tokens_per_batch=tokens_per_batch,
        num_streams=num_streams,
        reserved=reserved,
    )
    lanes = tuple(_lane(contender, streams, original) for contender in contenders)
    for lane in lanes:
        _settle_tuning(lane, device, emit)
    tuning, tuned = {}, [lane.contender.recipe for lane in lanes if lane.tunes]
    for kind in set(map(tuning_kind_of, tuned)):
        moves, own_text = kind
        learning = rows.learning[own_text]
        epochs = {recipe.tuning_epochs for recipe in tuned if tuning_kind_of(recipe) == kind}
        tuning[kind] = start_tuning(skeleton, moves, epochs, learning.calibration, learning.held_out, device)
    return Course(skeleton, device, lanes, streams, original, tuning, clock, memory, experts_at_once)


def _experts_at_once(
    skeleton: Skeleton, contenders: Sequence[Contender], free: float | None, ranks: Ranks
) -> int | None:
    """As few as suit the contender that needs the most of them."""
    found = [
        fitting_experts(block_memory(skeleton, each.plan, each.recipe), free, copies_of_sums(ranks, each.recipe))
        for each in contenders
        if each.recipe.needs_calibration
    ]
    return min((each for each in found if each is not None), default=None)


def _shared_streams(
    start: Callable[..., Streams], recipe: Recipe, steps: int, clock: StageClock, emit: Emit
) -> Streams:
    """The original streams for all recipes of this one's kind.

    start: `start_streams`, but for its `step`. steps: of the way there and back to the second block, for gradients.
    """
    if recipe.sensitivity == "none":
        return start(step=lambda index: None)
    done = 0

    def step(index: int) -> None:
        nonlocal done
        done += 1
        emit(TaskAdvanced(_GRADIENT_TASK, done))

    clock.enter(recipe.sensitivity)
    emit(TaskStarted(_GRADIENT_TASK, steps))
    streams = start(step=step)
    emit(TaskFinished(_GRADIENT_TASK))
    clock.enter(START)
    return streams


def _lane(contender: Contender, streams: Mapping[Kind, Streams], original: HiddenStates) -> Lane:
    recipe = contender.recipe
    if not recipe.needs_calibration:
        return Lane(contender, original.copy(), None)
    shared = streams[kind_of(recipe)]
    lane = Lane(contender, original.copy(), shared)
    if recipe.propagates:
        lane.calibration = shared.calibration.original.copy()
        lane.held_out = None if shared.held_out is None else shared.held_out.original.copy()
    return lane


def _settle_tuning(lane: Lane, device: torch.device, emit: Emit) -> None:
    recipe = lane.contender.recipe
    if lane.streams is None or recipe.tuning_epochs <= 0:
        return
    no_room = why_not_tuned(recipe, lane.contender.plan, device)
    if no_room is not None:
        emit(Caution(f"{lane.contender.label}: {no_room}"))
        lane.num_fallbacks += 1
    lane.tunes = no_room is None


def kind_of(recipe: Recipe) -> Kind:
    return recipe.sensitivity, recipe.own_text


def tuning_kind_of(recipe: Recipe) -> TuningKind:
    return recipe.tuning, recipe.own_text


def is_of_kind(recipe: Recipe, kind: Kind) -> bool:
    return recipe.needs_calibration and kind_of(recipe) == kind
