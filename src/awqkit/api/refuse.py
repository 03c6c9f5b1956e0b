"""What is wrong with a model or its calibration rows and can be seen before any work, as one line each."""

from __future__ import annotations

import torch

from awqkit.checkpoint.reader import Checkpoint
from awqkit.errors import CalibrationError, CheckpointError
from awqkit.model.skeleton import Skeleton
from awqkit.pipeline.activations import TokenRows

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


def refuse_too_few(rows: TokenRows, ranks: int) -> None:
    """Raises CalibrationError where not every rank gets a calibration row."""
    if len(rows.ids) < ranks:
        raise CalibrationError(
            f"{len(rows.ids)} calibration rows cannot be shared out among {ranks} ranks: start fewer ranks, or ask for "
            "more rows (--samples)"
        )
