"""The stage after the last block: the blocks as they were quantized, tuned together and written again."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awqkit.decisions import TuningDecision
from awqkit.events import Emit, Notice, TaskAdvanced, TaskFinished, TaskStarted
from awqkit.methods.tuning import TunableGain, TunableLinear
from awqkit.model.matrices import parameter_of
from awqkit.model.skeleton import Skeleton
from awqkit.model.structure import BlockStructure
from awqkit.numerics.grid import QuantizedWeight
from awqkit.pipeline.activations import HiddenStates, TokenRows
from awqkit.pipeline.block_step import BlockResult
from awqkit.pipeline.context import BlockContext, Streams
from awqkit.pipeline.free_memory import free_bytes
from awqkit.pipeline.plan import RunPlan
from awqkit.pipeline.tunable_block import TunableBlock
from awqkit.pipeline.tune import STEPPING, TuningRows, tune, visited
from awqkit.recipe import Recipe

_TASK = "tune"
_SHARE_OF_FREE = 0.5  # of the free memory, for what is kept of all blocks
_NO_ROOM = (
    "scales are not tuned on the whole model: the codes of all blocks take {needed:.1f} GB, and {kind} has {free:.1f} "
    "GB free, of which they may have half; tuning_epochs = 0 in a recipe file asks for that"
)


@dataclass(frozen=True, slots=True)
class TuningStart:
    """The first block's inputs, taken before the block loop overwrites them."""

    calibration: HiddenStates
    held_out: HiddenStates | None
    rows: TokenRows
    held_out_rows: TokenRows | None


def start_tuning(
    skeleton: Skeleton,
    tuning: str,
    epochs: Collection[float],
    rows: TokenRows,
    held_out: TokenRows | None,
    device: torch.device,
) -> TuningStart:
    """The rows in the batches that tuning steps through. tuning, epochs: as in the Recipe, of each that has a share."""
    tokens = STEPPING[tuning].tokens_per_step

    def looked_at(num_batches: int) -> set[int]:
        return {position for each in epochs for position in visited(num_batches, each)}

    calibration = HiddenStates(skeleton, rows, device, tokens_per_batch=tokens, only=looked_at)
    checked = None if held_out is None else HiddenStates(skeleton, held_out, device, tokens_per_batch=tokens)
    return TuningStart(calibration, checked, rows, held_out)


def why_not_tuned(recipe: Recipe, plan: RunPlan, device: torch.device) -> str | None:
    """Why tuning is left out: what it keeps of all blocks does not fit into half of the free memory. None if it does.

    What it keeps: a byte for every code (two at 8 bits), and what stays in full precision.
    """
    code_bytes = 1 if recipe.bits < 8 else 2
    needed = sum(math.prod(linear.shape) * (code_bytes if linear.keep is None else 4) for linear in plan.linears)
    free = free_bytes(device)
    if free is None or needed <= _SHARE_OF_FREE * free:
        return None
    return _NO_ROOM.format(needed=needed / 1e9, free=free / 1e9, kind=device.type)


def tunable_block(context: BlockContext, result: BlockResult) -> TunableBlock:
    """A block as it was just quantized, on its device, holding nothing of the original's linear weights."""
    structure = context.structure
    views = {structure.linear(name).weight: structure.linear(name) for name in result.quantized}
    linears = {
        name: TunableLinear(result.quantized[view.name], context.recipe.tuning, transposed=view.transposed)
        for name, view in views.items()
    }
    stored = {**context.parameters, **dict(context.block.named_buffers()), **result.stored}
    for stack in {parameter_of(name) for name in (*linears, *result.stored) if parameter_of(name) != name}:
        matrices = stored.pop(stack)  # each by its own name from here on
        stored = {**{f"{stack}[{index}]": matrix for index, matrix in enumerate(matrices)}, **stored}
    gains = {
        name: TunableGain.of(stored[name], is_offset=is_offset) for name, is_offset in _gain_vectors(structure).items()
    }
    fixed = {name: value for name, value in stored.items() if name not in linears and name not in gains}
    return TunableBlock(context.block, views, linears, gains, fixed)


def _gain_vectors(structure: BlockStructure) -> Mapping[str, bool]:
    """Names of the vectors that multiply a linear's input, by what discovery proved; True where as 1 + w."""
    found = {}
    for fold in structure.folds:
        if fold.offset is not None:
            found[fold.offset] = True
        elif fold.kind == "norm":
            found[fold.producer[0]] = False
    return found


def finish_tuning(
    skeleton: Skeleton,
    recipe: Recipe,
    stored_dtype: torch.dtype,
    start: TuningStart,
    streams: Streams,
    blocks: Sequence[TunableBlock],
    emit: Emit,
) -> tuple[TuningDecision, list[tuple[Mapping[str, QuantizedWeight], Mapping[str, Tensor]]]]:
    """Tune, and return per block the moved linears by name and gains by parameter name (nothing where it was no help).

    streams: at the last block's output.
    """
    emit(TaskStarted(_TASK, 1))

    def step(done: int, total: int) -> None:
        emit(TaskAdvanced(_TASK, done / total, f"step {done} of {total}"))

    held_out = None
    if start.held_out is not None and streams.held_out is not None and start.held_out_rows is not None:
        ends = streams.held_out.original, streams.held_out.quantized
        held_out = TuningRows(start.held_out_rows, start.held_out, *ends)
    before, after = tune(
        skeleton,
        blocks,
        TuningRows(start.rows, start.calibration, streams.calibration.original),
        held_out,
        epochs=recipe.tuning_epochs,
        stepping=STEPPING[recipe.tuning],
        seed=recipe.seed,
        device=start.calibration.device,
        step=step,
        told=lambda text: emit(Notice(text)),
    )
    emit(TaskFinished(_TASK))
    fallback = None
    if before is not None and after is not None and not after < before:
        fallback = f"held-out KL was no better after tuning ({after:.4e}, {before:.4e} before): scales left as before"
        return TuningDecision(recipe.tuning_epochs, before, after, fallback), [({}, {}) for _ in blocks]
    moved = [
        (
            {block.views[name].name: linear.finished(stored_dtype) for name, linear in block.linears.items()},
            {name: gain.finished(stored_dtype) for name, gain in block.gains.items()},
        )
        for block in blocks
    ]
    return TuningDecision(recipe.tuning_epochs, before, after, fallback), moved
