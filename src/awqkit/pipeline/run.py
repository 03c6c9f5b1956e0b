"""A whole run, top to bottom: what lies outside the blocks is copied, then one step per block."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from awqkit.checkpoint.tensor_source import TensorSource
from awqkit.checkpoint.writer import CheckpointWriter
from awqkit.decisions import BlockDecision, TuningDecision
from awqkit.errors import CheckpointError
from awqkit.events import (
    BlockFinished,
    Caution,
    Emit,
    Notice,
    TaskAdvanced,
    TaskFinished,
    TaskStarted,
    ignore_events,
)
from awqkit.formats.format import Format
from awqkit.model.matrices import with_stacks_whole
from awqkit.model.skeleton import Skeleton
from awqkit.numerics.grid import QuantizedWeight
from awqkit.pipeline.across_blocks import AcrossBlocks
from awqkit.pipeline.activations import TokenRows
from awqkit.pipeline.background_writes import BackgroundWrites
from awqkit.pipeline.block_memory import BlockMemory, block_memory, fitting_experts, fitting_tokens
from awqkit.pipeline.block_step import BlockResult, Stage, quantize_block
from awqkit.pipeline.context import BlockContext, Streams
from awqkit.pipeline.durable_points import DurablePoints, follow_block, follow_restore
from awqkit.pipeline.free_memory import free_bytes
from awqkit.pipeline.layout import OutputLayout, packed_parts
from awqkit.pipeline.plan import BlockPlan, RunPlan
from awqkit.pipeline.ranks import Ranks
from awqkit.pipeline.read_ahead import ReadAhead
from awqkit.pipeline.row_parts import copies_of_sums
from awqkit.pipeline.smaller_batches import begin_block, halve, no_room, run_again
from awqkit.pipeline.stage_clock import StageClock
from awqkit.pipeline.start_streams import start_streams
from awqkit.pipeline.tunable_block import TunableBlock
from awqkit.pipeline.tuning_stage import finish_tuning, start_tuning, tunable_block, why_not_tuned
from awqkit.pipeline.whole_streams import streams_to_tune
from awqkit.recipe import Recipe

_TASK, _GRADIENT_TASK = "block", "gradient step"


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that a run reads; nothing in it changes but what is found once for all blocks, in `across`.

    experts_at_once, across: see `BlockContext`.
    """

    source: TensorSource
    skeleton: Skeleton
    recipe: Recipe
    plan: RunPlan
    layout: OutputLayout
    written: Format
    device: torch.device
    ranks: Ranks = field(default_factory=Ranks.alone)
    experts_at_once: int | None = None
    across: AcrossBlocks = field(default_factory=AcrossBlocks)

    @property
    def memory(self) -> BlockMemory:
        """What the largest block needs."""
        return block_memory(self.skeleton, self.plan, self.recipe, self.experts_at_once)

    def with_fitting_experts(self) -> Run:
        """The same with as many experts at a time as fit the memory that is free now."""
        at_once = fitting_experts(self.memory, free_bytes(self.device), copies_of_sums(self.ranks, self.recipe))
        return replace(self, experts_at_once=at_once)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The Decisions of all blocks and of tuning, and the seconds that each stage took in sum."""

    blocks: tuple[BlockDecision, ...]
    tuning: TuningDecision | None
    seconds: dict[str, float]


def run(
    job: Run,
    rows: TokenRows | None,
    held_out: TokenRows | None,
    writer: CheckpointWriter,
    points: DurablePoints,
    emit: Emit,
) -> Outcome:
    """Quantize every block and write every tensor. rows: None for a recipe that looks at no text.

    The first rank runs this, the others `follow` it: what one tells the other is told, in the same order.
    points: where an earlier run got to, and how often this one is made durable. Raises CheckpointError where a tensor
    holds NaN or inf.
    """
    clock, num_blocks = StageClock(), len(job.plan.blocks)
    clock.seconds.update(points.seconds)
    clock.enter("copy")
    inside = tuple(f"{block.path}." for block in job.plan.blocks)
    names = (name for name in job.skeleton.names() if name.startswith(inside))
    in_blocks = {disk for name in names for disk in job.skeleton.disk_names(name)}
    buffers = job.skeleton.buffers_on_disk()
    for name in job.layout.kept:
        if name not in in_blocks and not writer.has(name):
            _copy(job, name, writer, is_buffer=name in buffers)
    clock.enter("start")
    streams, ranks = None, job.ranks
    if rows is not None:
        at_once = points.experts_at_once(lambda: job.with_fitting_experts().experts_at_once)
        job = replace(job, experts_at_once=ranks.told(at_once))
        batch = ranks.told(points.batch_tokens(lambda: fitting_tokens(job.memory, job.device, free_bytes(job.device))))
        streams = _streams(job, rows, held_out, batch, points, emit)
    start, tuning = None, None
    if rows is not None and job.recipe.tuning_epochs > 0:
        no_room = points.why_not_tuned(lambda: why_not_tuned(job.recipe, job.plan, job.device))
        if no_room is None:
            epochs = (job.recipe.tuning_epochs,)
            start = start_tuning(job.skeleton, job.recipe.tuning, epochs, rows, held_out, job.device)
        else:
            emit(Caution(no_room))
            tuning = TuningDecision(0, None, None, no_room)
    if streams is not None:
        ranks.told((points.blocks, start is not None))
    if points.blocks:
        emit(Notice(f"an earlier run was stopped: going on after block {points.blocks} of {num_blocks}"))
    emit(TaskStarted(_TASK, num_blocks, points.blocks))
    decisions, tunable = points.decisions, list[TunableBlock | None]()
    if points.blocks:
        clock.enter("resume")
        if streams is not None:
            points.restore(streams)
        tunable += [
            _finished_block(job, index, points) if start is not None else None for index in range(points.blocks)
        ]
        emit(TaskAdvanced(_TASK, points.blocks))
    tunes = start is not None
    with ReadAhead(job.source, job.skeleton, job.device) as ahead, BackgroundWrites(job.device) as writes:
        for index in range(points.blocks, num_blocks):
            started = time.monotonic()

            def stage(name: str, index: int = index) -> None:
                clock.enter(name)
                emit(TaskAdvanced(_TASK, index, name))

            result, block = _one_block(job, index, streams, stage, writer, ahead, writes, points, emit, tunes=tunes)
            decisions.append(result.decision)
            tunable.append(block)
            clock.enter("save")
            if block is not None:
                points.keep_result(index, result)
            due = points.is_due(num_blocks, len(decisions))
            if ranks.told(due) if streams is not None else due:
                writes.wait()
                points.make(num_blocks, decisions, streams, clock.seconds)
            clock.enter("")
            emit(_finished(result.decision, num_blocks, time.monotonic() - started))
            emit(TaskAdvanced(_TASK, index + 1))
            del result, block  # the next block is done without the codes of this one
        clock.enter("write")
        writes.wait()
        clock.enter("")
    emit(TaskFinished(_TASK))
    job.across.let_go(emit)
    if start is not None and streams is not None:
        clock.enter("tune")
        whole = streams_to_tune(ranks, streams)
        assert whole is not None  # this is the first rank
        tuning, moved = finish_tuning(job.skeleton, job.recipe, job.plan.stored_dtype, start, whole, tunable, emit)
        points.before_rewriting()
        for index, (linears, gains) in enumerate(moved):
            _rewrite(job, index, linears, gains, writer)
        clock.enter("")
    return Outcome(tuple(decisions), tuning, {name: seconds for name, seconds in clock.seconds.items() if name})


def follow(job: Run, rows: TokenRows | None, held_out: TokenRows | None) -> None:
    """What every rank but the first does in a run: its share of each block. It writes nothing."""
    if rows is None:
        return
    ranks, job = job.ranks, replace(job, experts_at_once=job.ranks.told())
    streams = _streams(job, rows, held_out, ranks.told(), None, ignore_events)
    done, tunes = ranks.told((0, False))  # what the first rank says of both
    if done:
        follow_restore(ranks, streams)
    with ReadAhead(job.source, job.skeleton, job.device) as ahead:
        for index in range(done, len(job.plan.blocks)):
            block = job.skeleton.load_block(index, job.device, ahead.read)
            ahead.ask(index + 1)
            try:
                quantize_block(block_context(job, index, block), streams, lambda stage: None)
            finally:
                job.skeleton.release_block(index)
            follow_block(ranks, streams)
    job.across.let_go(ignore_events)
    if tunes:
        streams_to_tune(ranks, streams)


def _streams(
    job: Run,
    rows: TokenRows,
    held_out: TokenRows | None,
    batch: tuple[int, int],
    points: DurablePoints | None,
    emit: Emit,
) -> Streams:
    """Hidden states before the first block; for end-loss gradients the whole model runs forward and back before it.

    batch: as `DurablePoints.batch_tokens` gives it. points: None on ranks that only follow.
    """
    steps, done = 2 * len(job.plan.blocks) - 1, 0  # there, and back to the second block
    memory, length = job.memory, rows.ids.shape[1]
    tokens, halved = batch

    def step(index: int) -> None:
        nonlocal done
        done += 1
        emit(TaskAdvanced(_GRADIENT_TASK, done))

    if job.recipe.sensitivity != "none":
        emit(TaskStarted(_GRADIENT_TASK, steps))

    def begin() -> Streams:
        nonlocal done
        done = 0
        return start_streams(
            job.skeleton,
            job.recipe,
            rows,
            held_out,
            job.device,
            step,
            tokens_per_batch=tokens,
            reserved=memory.with_tokens(tokens),
            ranks=job.ranks,
        )

    def smaller() -> int:
        nonlocal tokens
        assert points is not None
        if tokens <= length:
            raise no_room("the model", memory, length, job.device)
        tokens //= 2
        points.note_batch_tokens(tokens, halved)
        return max(tokens, length)

    if points is None or job.ranks.size > 1:
        streams = begin()
    else:
        streams = run_again(begin, smaller, "hidden states before the first block", job.device, emit)
    if job.recipe.sensitivity != "none":
        emit(TaskFinished(_GRADIENT_TASK))
    for _ in range(halved):
        halve(streams.named.values(), job.skeleton)
    return streams


def _finished_block(job: Run, index: int, points: DurablePoints) -> TunableBlock:
    """A block that an earlier run has finished, as tuning needs it."""
    block = job.skeleton.load_block(index, job.device)
    try:
        context = block_context(job, index, block)
        return tunable_block(context, points.result(context.block_plan, job.device))
    finally:
        job.skeleton.release_block(index)


def block_context(job: Run, index: int, block: nn.Module) -> BlockContext:
    """What the steps of a block share, its weights being in memory."""
    parameters = {name: value.data for name, value in block.named_parameters()}
    plan, of_block = job.plan, job.plan.blocks[index]
    return BlockContext(
        job.skeleton,
        plan,
        of_block,
        job.recipe,
        block,
        parameters,
        job.ranks,
        experts_at_once=job.experts_at_once,
        across=job.across,
    )


def _one_block(
    job: Run,
    index: int,
    streams: Streams | None,
    stage: Stage,
    writer: CheckpointWriter,
    ahead: ReadAhead,
    writes: BackgroundWrites,
    points: DurablePoints,
    emit: Emit,
    *,
    tunes: bool,
) -> tuple[BlockResult, TunableBlock | None]:
    def quantized() -> tuple[BlockContext, BlockResult]:
        stage("read")
        if streams is not None and job.ranks.size == 1:  # several ranks cannot begin again one by one
            begin_block(streams.named.values(), job.device)
        context = block_context(job, index, job.skeleton.load_block(index, job.device, ahead.read))
        ahead.ask(index + 1)
        return context, quantize_block(context, streams, stage)

    def smaller() -> int | None:
        job.skeleton.release_block(index)
        job.across.replays.let_go()
        if streams is None:
            return None
        memory, rows = job.memory, streams.calibration.original
        if not halve(streams.named.values(), job.skeleton):
            raise no_room(job.plan.blocks[index].path, memory, rows.shape[1], job.device)
        points.note_halved()
        return rows.tokens_per_batch

    try:
        if job.ranks.size > 1:
            context, result = quantized()
        else:
            context, result = run_again(quantized, smaller, job.plan.blocks[index].path, job.device, emit)
        stage("write")
        writes.start(_writing(job, context, result, writer))
        return result, tunable_block(context, result) if tunes else None
    finally:
        job.skeleton.release_block(index)


def _writing(job: Run, context: BlockContext, result: BlockResult, writer: CheckpointWriter) -> Callable[[], None]:
    """`_write` for a block. While it waits for its turn nothing holds the block's own weights."""
    changed = with_stacks_whole(context.parameters, result.stored)
    names = list(context.parameters), [name for name, _ in context.block.named_buffers()]
    return partial(_write, job, context.block_plan, result.quantized, changed, *names, writer)


def _write(
    job: Run,
    block: BlockPlan,
    quantized: Mapping[str, QuantizedWeight],
    changed: Mapping[str, torch.Tensor],
    parameters: Sequence[str],
    buffers: Sequence[str],
    writer: CheckpointWriter,
) -> None:
    """Pack the quantized linears of a block and write its other tensors in the dtype that the layout says."""
    path = block.path
    for part, tensor in packed_tensors(job, block, quantized):
        writer.write(part, tensor)
    stored = {
        disk: value
        for name, new in changed.items()
        for disk, value in job.skeleton.parts(f"{path}.{name}", new).items()
    }
    for name in [*parameters, *buffers]:
        for disk in job.skeleton.disk_names(f"{path}.{name}"):
            if disk in job.layout.packed or disk in job.layout.dropped:
                continue
            if disk in stored:
                writer.write(disk, stored[disk].to(job.layout.kept[disk]).cpu())
            else:
                _copy(job, disk, writer, is_buffer=name in buffers)


def packed_tensors(
    job: Run, block: BlockPlan, quantized: Mapping[str, QuantizedWeight]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name on disk and tensor of all that linears, by name inside the block, are packed into."""
    return _packed(job, block, quantized, job.written.pack)


def _packed(
    job: Run, block: BlockPlan, quantized: Mapping[str, QuantizedWeight], pack: Callable[..., dict[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, weight in quantized.items():
        for disk, rows in packed_parts(job.skeleton, block, name).items():
            if disk in job.layout.packed:
                packed = pack(job.layout.packed[disk], weight.rows(rows), job.layout.scheme, job.plan.stored_dtype)
                yield from ((part, tensor.cpu()) for part, tensor in packed.items())


def _rewrite(
    job: Run,
    index: int,
    linears: Mapping[str, QuantizedWeight],
    gains: Mapping[str, torch.Tensor],
    writer: CheckpointWriter,
) -> None:
    """Put what tuning moved in the place of what was written: linears by name, gains by parameter, in the block.

    Of linears it moved the group scales.
    """
    block = job.plan.blocks[index]
    for part, tensor in _packed(job, block, linears, job.written.pack_scales):
        writer.rewrite(part, tensor)
    for name, value in gains.items():
        disk = job.skeleton.disk_name(f"{block.path}.{name}")
        writer.rewrite(disk, value.to(job.layout.kept[disk]).cpu())


def _copy(job: Run, name: str, writer: CheckpointWriter, *, is_buffer: bool) -> None:
    tensor = job.source.read(name)
    checked = tensor.is_floating_point() and not is_buffer  # a mask in a buffer may hold −inf
    if checked and not all(bool(torch.isfinite(part).all()) for part in _pieces(tensor)):
        raise CheckpointError(
            f"tensor {name} holds NaN or inf, so the checkpoint is damaged: fetch or convert it again; "
            "nothing was kept of this run"
        )
    writer.write(name, tensor.to(job.layout.kept[name]))


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Slices of at most a few million elements, so that a check of an embedding needs no second copy of it."""
    yield from tensor.reshape(-1).split(1 << 22)


def _finished(decision: BlockDecision, num_blocks: int, seconds: float) -> BlockFinished:
    errors = [(linear.output_error_nearest, linear.output_error) for linear in decision.linears]
    known = [pair for pair in errors if pair[0] is not None and pair[1] is not None]
    mean = [sum(pair[side] for pair in known) / len(known) for side in (0, 1)] if known else [None, None]
    return BlockFinished(decision.index, num_blocks, seconds, mean[0], mean[1], decision.num_fallbacks)
