"""Calibration rows that the model writes itself, beside those of the text."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from awqkit.api.calibration_rows import CalibrationRows
from awqkit.api.given_model import GivenModel
from awqkit.checkpoint.reader import Checkpoint
from awqkit.errors import AwqkitError
from awqkit.evaluation.load import load_checkpoint
from awqkit.events import Caution, Emit, Notice, TaskAdvanced, TaskFinished, TaskStarted
from awqkit.model.generate import generate_rows
from awqkit.model.skeleton import Skeleton
from awqkit.options import RunOptions
from awqkit.pipeline.activations import TokenRows
from awqkit.pipeline.free_memory import free_bytes
from awqkit.recipe import Recipe

_TASK = "step of the model's own text"
_NONE = "the model writes no calibration rows of its own, the text is used alone: {}; --generated 0 asks for that"
_PLAIN = "a plain module has no `generate`"
_GIST_CHARS = 160
_ROOM = 1.3  # memory ÷ weights: what the cache of a few passages and the activations need beside them


@dataclass(frozen=True, slots=True)
class OwnText:
    """What a model wrote: rows `[rows, tokens]` for calibration and then held-out ones, or why there are none."""

    ids: Tensor
    failed: str | None = None


def own_text(rows: CalibrationRows) -> OwnText:
    """What the model wrote of rows that `with_generated` gave."""
    summary = rows.summary
    parts = [rows.calibration.ids[summary.rows :]]
    if rows.held_out is not None:
        parts.append(rows.held_out.ids[summary.held_out_rows :])
    return OwnText(torch.cat(parts), summary.not_generated)


def with_generated(
    rows: CalibrationRows,
    recipe: Recipe,
    given: GivenModel,
    device: torch.device,
    options: RunOptions,
    emit: Emit,
    kept: OwnText | None = None,
) -> CalibrationRows:
    """The rows, and behind them `recipe.generated` times as many that the model wrote, of the held-out ones as well.

    kept: what the model wrote in an earlier run, which is taken as it is. A plain module, and a model that does not fit
    into memory as a whole or cannot generate, writes nothing: a Caution says so, and the summary has the reason.
    """
    counts = [round(recipe.generated * count) for count in (rows.summary.rows, rows.summary.held_out_rows)]
    if not sum(counts):
        return rows
    if kept is not None:
        if kept.failed is not None:
            return replace(rows, summary=replace(rows.summary, not_generated=kept.failed))
        return _joined(rows, kept.ids, counts, recipe)
    if given.folder is None:
        return _without(rows, _PLAIN, emit)
    dtype, reason = _dtype_on(device), why_not_whole(given.folder, device)
    if reason is not None:
        return _without(rows, reason, emit)
    emit(TaskStarted(_TASK, 1))
    failed = None
    try:
        ids = _written(rows, sum(counts), recipe.seed, given.folder, given.skeleton, dtype, device, options, emit)
    except AwqkitError:
        raise
    except Exception as error:  # a model's own `generate` may be missing or fail in many ways; the text alone will do
        failed = f"{type(error).__name__}: {' '.join(str(error).split())[:_GIST_CHARS]}"
    finally:
        emit(TaskFinished(_TASK))
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what follows asks the driver how much is free
    if failed is not None:
        return _without(rows, failed, emit)
    emit(Notice(f"and {counts[0]} rows, {counts[1]} held out, that the model wrote itself"))
    return _joined(rows, ids, counts, recipe)


def _joined(rows: CalibrationRows, ids: Tensor, counts: list[int], recipe: Recipe) -> CalibrationRows:
    held_out = None if rows.held_out is None else rows.held_out.joined(TokenRows(ids[counts[0] :]))
    summary = replace(rows.summary, generated_rows=counts[0], generated_held_out_rows=counts[1])
    own = TokenRows(ids[: counts[0]]).weighing(recipe.generated_weight)
    return CalibrationRows(rows.calibration.joined(own), held_out, summary)


def _written(
    rows: CalibrationRows,
    num_rows: int,
    seed: int,
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    dtype: torch.dtype,
    device: torch.device,
    options: RunOptions,
    emit: Emit,
) -> Tensor:
    """Rows `[num_rows, tokens]` as long as the text's; the model is in memory no longer than this takes."""
    return generate_rows(
        load_checkpoint(checkpoint, dtype, device, trust_remote_code=options.trust_remote_code),
        skeleton.vocabulary_size,
        num_rows=num_rows,
        seq_len=rows.calibration.ids.shape[1],
        seed=seed,
        start_tokens=rows.summary.start_tokens,
        step=lambda done, total: emit(TaskAdvanced(_TASK, done / total)),
        told=lambda text: emit(Notice(text)),
    )


def _without(rows: CalibrationRows, reason: str, emit: Emit) -> CalibrationRows:
    told = _NONE.format(reason)
    emit(Caution(told))
    return replace(rows, summary=replace(rows.summary, not_generated=told))


def why_not_whole(folder: Checkpoint, device: torch.device) -> str | None:
    """Why a model cannot write text: as a whole it does not fit into what is free. None if it does."""
    needed, free = _needed_bytes(folder, _dtype_on(device)), free_bytes(device)
    if free is None or needed <= free:
        return None
    return f"as a whole it takes {needed / 1e9:.1f} GB, and {device.type} has {free / 1e9:.1f} GB free"


def _dtype_on(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _needed_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> float:
    weights = sum(tensor.spec.num_bytes // tensor.spec.dtype.itemsize for tensor in checkpoint.tensors.values())
    return _ROOM * weights * dtype.itemsize
