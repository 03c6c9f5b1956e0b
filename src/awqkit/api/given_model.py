"""What `quantize`, `compare` and `folds` start from, opened: a model folder, or a plain module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from awqkit.api.refuse import refuse_incomplete, refuse_misfit
from awqkit.api.refuse_plain import refuse_headless, refuse_low_bit, refuse_unstreamable
from awqkit.api.source import open_source
from awqkit.checkpoint.hub import resolve_model
from awqkit.checkpoint.reader import Checkpoint
from awqkit.checkpoint.tensor_source import HeldTensors, TensorSource
from awqkit.errors import CalibrationError, UsageError
from awqkit.model.plain_model import PlainModel, plain_tensors
from awqkit.model.skeleton import Skeleton
from awqkit.model.transformers_bridge import TextEncoder, load_config, load_text_encoder
from awqkit.options import RunOptions


@dataclass(frozen=True, slots=True)
class GivenModel:
    """A model that was looked through for what would stop a run.

    source: its tensors. folder: where they are from, None for a plain module. encoder(): its tokenizer; raises
    AwqkitError where there is none. caution: what to tell of its weights, or None.
    """

    name: str
    source: TensorSource
    skeleton: Skeleton
    folder: Checkpoint | None
    encoder: Callable[[], TextEncoder]
    caution: str | None = None


def find_given(model: str | Path | PlainModel) -> Path | PlainModel:
    """The folder of a model, fetched where it is a hub id, or the plain model. Raises UsageError for a bare module."""
    if isinstance(model, nn.Module):
        raise UsageError(
            f"{type(model).__name__} is a bare module: give awqkit.PlainModel(module, blocks=PATH), with the path of "
            "its list of decoder blocks, or the folder of a model of transformers"
        )
    return model if isinstance(model, PlainModel) else resolve_model(model)


def given_name(model: str | Path | PlainModel) -> str:
    """A hub id as it is; of a folder its last part, since the way there is nobody's business."""
    if isinstance(model, PlainModel):
        return model.title
    return Path(model).resolve().name if Path(model).is_dir() else str(model)


def open_given(
    found: Path | PlainModel, name: str, device: torch.device, options: RunOptions, *, needs_logits: bool
) -> GivenModel:
    """The model that `find_given` found. needs_logits: whether more than its blocks will be run. Raises AwqkitError."""
    if isinstance(found, PlainModel):
        return _open_plain(found, name, device, needs_logits)
    opened, trust = open_source(found), options.trust_remote_code
    skeleton = Skeleton(load_config(found, trust_remote_code=trust), opened.checkpoint, trust_remote_code=trust)
    refuse_incomplete(opened.checkpoint, skeleton)
    refuse_misfit(opened.checkpoint, skeleton)
    return GivenModel(
        name,
        opened.checkpoint,
        skeleton,
        opened.checkpoint,
        lambda: load_text_encoder(found, trust_remote_code=trust),
        opened.caution,
    )


def _open_plain(plain: PlainModel, name: str, device: torch.device, needs_logits: bool) -> GivenModel:
    source = HeldTensors(plain_tensors(plain.module))
    skeleton = Skeleton(plain, source)
    refuse_low_bit(source, skeleton, name)
    refuse_unstreamable(skeleton, device)
    if needs_logits:
        refuse_headless(skeleton, device)

    def encoder() -> TextEncoder:
        if plain.encode is None:
            raise CalibrationError(
                f"{name} has no tokenizer to read text with: give token rows, lists of ids of one length, or "
                "PlainModel(encode=...), a function from text to ids"
            )

        def encode_all(texts: Sequence[str]) -> list[list[int]]:
            return [list(plain.encode(text)) for text in texts]

        return TextEncoder(encode_all, tuple(plain.start_tokens), None)

    return GivenModel(name, source, skeleton, None, encoder)
