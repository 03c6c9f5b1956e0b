"""What is wrong with a model or its calibration rows and can be seen before any work, as one line each."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from awqkit.checkpoint.output import refuse_full_disk
from awqkit.checkpoint.reader import Checkpoint
from awqkit.errors import CalibrationError, CheckpointError, NoRoomError
from awqkit.model.skeleton import Skeleton
from awqkit.pipeline.activations import TokenRows
from awqkit.pipeline.block_memory import block_memory, block_weights
from awqkit.pipeline.free_memory import free_bytes
from awqkit.pipeline.kept_states import SCRATCH
from awqkit.pipeline.plan import RunPlan
from awqkit.recipe import Recipe

FULL_PRECISION = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def refuse_incomplete(checkpoint: Checkpoint, skeleton: Skeleton) -> None:
    """Raises CheckpointError where the model that config.json describes needs a tensor that is not there."""
    missing = skeleton.missing()
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{checkpoint.directory}: of the tensors that config.json asks for, {missing[0]} is missing{more}; "
            "fetch the weights and config.json again, both from one place"
        )


def refuse_misfit(checkpoint: Checkpoint, skeleton: Skeleton) -> None:
    """Raises CheckpointError where a parameter on disk has another shape than the model's, or is no float."""
    for name, shape in skeleton.shapes_on_disk().items():
        stored = checkpoint.tensors[name]
        if stored.spec.shape != shape:
            raise CheckpointError(
                f"{stored.file}: tensor {name} is {list(stored.spec.shape)}, but config.json makes it {list(shape)}; "
                "fetch the weights and config.json again, both from one place"
            )
        if stored.spec.dtype not in FULL_PRECISION:
            dtype = str(stored.spec.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{stored.file}: tensor {name} is {dtype}; give the original model with bf16, fp16 or fp32 weights"
            )


def refuse_unknown_tokens(rows: TokenRows, skeleton: Skeleton, what: str = "calibration") -> None:
    """Raises CalibrationError where a row of `what` holds a token id that the model has no embedding for."""
    low, high = int(rows.ids.min()), int(rows.ids.max())
    if low < 0 or high >= skeleton.vocabulary_size:
        raise CalibrationError(
            f"{what}: token id {low if low < 0 else high} lies outside the model's vocabulary of "
            f"{skeleton.vocabulary_size}; the tokenizer is not this model's, use the files that belong to it"
        )


def refuse_large_weights(skeleton: Skeleton, device: torch.device) -> None:
    """Raises NoRoomError where a block's own weights, which even a look at it takes, do not fit."""
    _refuse_small_memory(block_weights(skeleton), "its weights in float32", device)


def refuse_large_block(
    skeleton: Skeleton, plan: RunPlan, recipe: Recipe, tokens_per_row: int, device: torch.device
) -> None:
    """Raises NoRoomError where what the recipe needs in a block does not fit beside a single calibration row."""
    memories = (block_memory(skeleton, plan, recipe, at_once) for at_once in (None, 1))
    least = min(memory.least(tokens_per_row) for memory in memories)
    _refuse_small_memory(least, "weights and statistics in float32, one calibration row", device)


def _refuse_small_memory(needed: int, parts: str, device: torch.device) -> None:
    free = free_bytes(device)
    if free is not None and needed > free:
        raise NoRoomError(
            f"one block of this model needs at least {needed / 1e9:.1f} GB ({parts}), and {device.type} has "
            f"{free / 1e9:.1f} GB free; end what else uses it, or take a device with more memory"
        )


def refuse_full_scratch(out: Path, scratch_bytes: int, durable_bytes: int) -> None:
    """Raises OutputError where temporary files would not fit, with what goes beside OUT where both are on one disk."""
    folder = Path(tempfile.gettempdir())
    together = folder.stat().st_dev == Path(os.path.realpath(out)).parent.stat().st_dev
    if scratch_bytes:
        refuse_full_disk(folder, scratch_bytes + (durable_bytes if together else 0), SCRATCH)


def refuse_too_few(rows: TokenRows, ranks: int) -> None:
    """Raises CalibrationError where not every rank gets a calibration row."""
    if len(rows.ids) < ranks:
        raise CalibrationError(
            f"{len(rows.ids)} calibration rows cannot be shared out among {ranks} ranks: start fewer ranks, or ask for "
            "more rows (--samples)"
        )
