"""`folds`: what discovery finds in each kind of block, before anything is quantized."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from awqkit.api.device import choose_device
from awqkit.api.given_model import find_given, given_name, open_given
from awqkit.checkpoint.hub import resolve_model
from awqkit.decisions import as_json
from awqkit.errors import UsageError
from awqkit.events import Emit, TaskAdvanced, TaskFinished, TaskStarted, ignore_events
from awqkit.model.plain_model import PlainModel
from awqkit.model.proof import PROOF_TOLERANCE, proof_errors, proved_together
from awqkit.model.random_weights import RandomWeights
from awqkit.model.skeleton import Skeleton
from awqkit.model.structure import BlockStructure
from awqkit.model.transformers_bridge import load_config
from awqkit.options import RunOptions
from awqkit.pipeline.plan import Probe, discover_block, make_probe

_TASK = "kind of block"


@dataclass(frozen=True, slots=True)
class FoundFold:
    """One place where s can be absorbed. proof_error: the largest relative change of the block's output under powers of
    two; exact where that is at most 1e-5, and only then is it used."""

    producer: str
    kind: str
    consumers: tuple[str, ...]
    channels: int
    proof_error: float
    exact: bool


@dataclass(frozen=True, slots=True)
class FoundKind:
    """One kind of block. path: of the first of its blocks. linears: name -> (out, in). refused: producer and why it is
    no fold. unwatched: matrices of the block that are not called exactly once as a linear, which stay as they are."""

    path: str
    blocks: tuple[int, ...]
    linears: dict[str, tuple[int, int]]
    folds: tuple[FoundFold, ...]
    refused: tuple[tuple[str, str], ...]
    unwatched: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FoundFolds:
    """What a model's blocks are. random_weights: whether the weights were made up from the config alone."""

    model: str
    random_weights: bool
    num_blocks: int
    kinds: tuple[FoundKind, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON-able values."""
        return as_json(self)


def folds(
    model: str | Path | PlainModel,
    *,
    random_weights: bool = False,
    options: RunOptions | None = None,
    emit: Emit = ignore_events,
) -> FoundFolds:
    """What discovery finds in `model`, a folder, a hub id or a PlainModel, and the proof's error of each fold.

    random_weights: take the config alone; the folder needs no weights, and of a hub model none are fetched. One block
    at a time is in memory. Raises AwqkitError where the model cannot be understood.
    """
    options = options or RunOptions()
    device = choose_device(options.device)
    if random_weights:
        skeleton = _random_skeleton(model, options)
    else:
        found_model = find_given(model)
        skeleton = open_given(found_model, given_name(model), device, options, needs_logits=False).skeleton
    probe = make_probe(skeleton, device)
    kinds: dict[Any, list[int]] = {}
    for index in range(skeleton.num_blocks):
        kinds.setdefault(skeleton.block_kind(index), []).append(index)
    emit(TaskStarted(_TASK, len(kinds)))
    found = []
    for done, blocks in enumerate(kinds.values(), 1):
        found.append(_look_at_kind(skeleton, probe, blocks, device))
        emit(TaskAdvanced(_TASK, done))
    emit(TaskFinished(_TASK))
    name = model.title if isinstance(model, PlainModel) else str(model)
    return FoundFolds(name, random_weights, skeleton.num_blocks, tuple(found))


def _random_skeleton(model: str | Path | PlainModel, options: RunOptions) -> Skeleton:
    if isinstance(model, PlainModel):
        raise UsageError("random_weights takes the config of a folder; a plain module has weights of its own")
    trust = options.trust_remote_code
    config = load_config(resolve_model(model, weights=False), trust_remote_code=trust)
    return Skeleton(config, RandomWeights(config, trust_remote_code=trust), trust_remote_code=trust)


def _look_at_kind(skeleton: Skeleton, probe: Probe, blocks: Sequence[int], device: torch.device) -> FoundKind:
    first = blocks[0]
    structure = discover_block(skeleton, probe, first, device)
    apart = {fold.label: why for fold in structure.folds if (why := fold.why_not_together(fold.consumers))}
    refused = {refusal.label: refusal.reason for refusal in structure.refusals} | apart
    return FoundKind(
        skeleton.block_path(first),
        tuple(blocks),
        {view.name: view.shape for view in structure.linears},
        _proved(skeleton, probe, first, structure, device, apart),
        tuple(refused.items()),
        structure.unwatched,
    )


def _proved(
    skeleton: Skeleton,
    probe: Probe,
    index: int,
    structure: BlockStructure,
    device: torch.device,
    left_out: Container[str],
) -> tuple[FoundFold, ...]:
    block = skeleton.load_block(index, device)
    run = probe.runner(block, index)
    found = []
    try:
        with torch.no_grad():
            for group in proved_together(structure):
                asked = [fold for fold in group if fold.label not in left_out]
                errors = proof_errors(block, run, probe.hidden, structure, asked) if asked else ()
                for fold, error in zip(asked, errors, strict=True):
                    exact = error <= PROOF_TOLERANCE
                    found.append(FoundFold(fold.label, fold.kind, fold.consumers, fold.num_channels, error, exact))
    finally:
        skeleton.release_block(index)
    return tuple(found)
