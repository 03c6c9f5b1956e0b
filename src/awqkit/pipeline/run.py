"""A whole run, top to bottom: what lies outside the blocks is copied, then one step per block."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from awqkit.checkpoint.reader import Checkpoint
from awqkit.checkpoint.writer import CheckpointWriter
from awqkit.decisions import BlockDecision
from awqkit.errors import CheckpointError
from awqkit.events import BlockFinished, Emit, TaskAdvanced, TaskFinished, TaskStarted
from awqkit.formats.format import Format
from awqkit.model.skeleton import Skeleton
from awqkit.pipeline.activations import HiddenStates, TokenRows
from awqkit.pipeline.block_step import BlockResult, Stage, quantize_block
from awqkit.pipeline.context import BlockContext, Stream, Streams
from awqkit.pipeline.end_gradients import measure_end_gradients
from awqkit.pipeline.layout import OutputLayout
from awqkit.pipeline.plan import RunPlan
from awqkit.recipe import Recipe

_PROBE_ROWS = 2  # calibration rows that the row weights are measured on
_CHECK_BATCH_DIVISOR = 4  # the check holds two more sets of the block's weights
_BACKWARD_BATCH_DIVISOR = 2  # a backward pass keeps what a forward pass drops
_TASK = "block"


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that a run reads; nothing in it changes."""

    checkpoint: Checkpoint
    skeleton: Skeleton
    recipe: Recipe
    plan: RunPlan
    layout: OutputLayout
    written: Format
    device: torch.device


@dataclass(frozen=True, slots=True)
class Outcome:
    """The Decisions of all blocks, and the seconds that each stage took in sum."""

    blocks: tuple[BlockDecision, ...]
    seconds: dict[str, float]


class StageClock:
    """Adds up the wall time between stage names."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stage, self._since = "", time.monotonic()

    def enter(self, stage: str) -> None:
        """The stage before this one is over."""
        now = time.monotonic()
        if self._stage:
            self.seconds[self._stage] += now - self._since
        self._stage, self._since = stage, now


def run(job: Run, rows: TokenRows | None, held_out: TokenRows | None, writer: CheckpointWriter, emit: Emit) -> Outcome:
    """Quantize every block and write every tensor. rows: None for a recipe that looks at no text.

    Raises CheckpointError where a tensor holds NaN or inf.
    """
    clock, num_blocks = StageClock(), len(job.plan.blocks)
    emit(TaskStarted(_TASK, num_blocks))
    clock.enter("copy")
    inside = tuple(f"{block.path}." for block in job.plan.blocks)
    in_blocks = {job.skeleton.disk_name(name) for name in job.skeleton.names() if name.startswith(inside)}
    for name in job.layout.kept:
        if name not in in_blocks:
            _copy(job, name, writer)
    clock.enter("start")
    streams = None if rows is None else _streams(job, rows, held_out, lambda index: None)
    decisions = []
    for index in range(num_blocks):
        started = time.monotonic()

        def stage(name: str, index: int = index) -> None:
            clock.enter(name)
            emit(TaskAdvanced(_TASK, index, name))

        result = _one_block(job, index, streams, stage, writer)
        decisions.append(result.decision)
        clock.enter("")
        emit(_finished(result.decision, num_blocks, time.monotonic() - started))
        emit(TaskAdvanced(_TASK, index + 1))
    emit(TaskFinished(_TASK))
    return Outcome(tuple(decisions), {name: seconds for name, seconds in clock.seconds.items() if name})


def _streams(job: Run, rows: TokenRows, held_out: TokenRows | None, step: Callable[[int], None]) -> Streams:
    def stream(part: TokenRows, batch_divisor: int = 1) -> Stream:
        original = HiddenStates(job.skeleton, part, job.device, batch_divisor=batch_divisor)
        return Stream(original, original.copy() if job.recipe.propagates else None)

    gradients = None
    if job.recipe.sensitivity != "none":
        gradients = measure_end_gradients(
            job.skeleton, rows, job.device, job.recipe.seed, Path(tempfile.gettempdir()), step
        )
    return Streams(
        calibration=stream(rows, _BACKWARD_BATCH_DIVISOR if gradients is not None else 1),
        probe=HiddenStates(job.skeleton, rows.rows(slice(0, _PROBE_ROWS)), job.device),
        held_out=None if held_out is None else stream(held_out, _CHECK_BATCH_DIVISOR),
        gradients=gradients,
    )


def _one_block(job: Run, index: int, streams: Streams | None, stage: Stage, writer: CheckpointWriter) -> BlockResult:
    stage("read")
    block = job.skeleton.load_block(index, job.device)
    try:
        parameters = {name: value.data for name, value in block.named_parameters()}
        context = BlockContext(job.skeleton, job.plan, job.plan.blocks[index], job.recipe, block, parameters)
        result = quantize_block(context, streams, stage)
        stage("write")
        _write(job, context, result, writer)
    finally:
        job.skeleton.release_block(index)
    return result


def _write(job: Run, context: BlockContext, result: BlockResult, writer: CheckpointWriter) -> None:
    """Pack the quantized linears of a block and write its other tensors in the dtype that the layout says."""
    quantized = {context.structure.linear(name).weight: weight for name, weight in result.quantized.items()}
    tensors = [*context.parameters, *(name for name, _ in context.block.named_buffers())]
    for name in tensors:
        disk = job.skeleton.disk_name(f"{context.block_plan.path}.{name}")
        if disk is None or disk in job.layout.dropped:
            continue
        if name in quantized:
            packed = job.written.pack(
                job.layout.packed[disk], quantized[name], job.layout.scheme, job.plan.stored_dtype
            )
            for part, tensor in packed.items():
                writer.write(part, tensor.cpu())
        elif name in result.stored:
            writer.write(disk, result.stored[name].to(job.layout.kept[disk]).cpu())
        else:
            _copy(job, disk, writer)


def _copy(job: Run, name: str, writer: CheckpointWriter) -> None:
    tensor = job.checkpoint.read(name)
    if tensor.is_floating_point() and not all(bool(torch.isfinite(part).all()) for part in _pieces(tensor)):
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
