"""What awqkit makes of a small architecture: found, streamed, folded, quantized, loaded, each held to the original."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from architecture_table import NOT_BUILT
from small_models import VOCABULARY, settings_by_hand, small_config, small_model
from tiny_models import WeightsOf, save_tiny
from torch import Tensor, nn

from awqkit import Recipe, RunOptions, load, quantize
from awqkit.errors import AwqkitError
from awqkit.methods.fold import consumer_scale
from awqkit.model.block_calls import hand_on
from awqkit.model.matrices import matrix_of
from awqkit.model.proof import PROOF_TOLERANCE, proof_errors, proved_together
from awqkit.model.skeleton import Skeleton
from awqkit.model.structure import BlockStructure
from awqkit.numerics.grid import dequantize
from awqkit.pipeline import run as pipeline_run
from awqkit.pipeline.plan import Found, look_at

CPU = torch.device("cpu")
STREAMED, LOADED = 1e-5, 1e-5  # largest distance of logits, relative to their norm
FOLDED = {torch.float64: 1e-6, torch.float32: 1e-5}  # the second where a module insists on float32
ROWS, TOKENS = 18, 24


@dataclass(frozen=True)
class Outcome:
    """linears, folds: how many in each block that is unlike the ones before it. reason: why it is not handled."""

    blocks: int = 0
    linears: tuple[int, ...] = ()
    folds: tuple[int, ...] = ()
    reason: str | None = None

    def as_json(self) -> dict[str, Any]:
        """As the data file has it."""
        if self.reason is not None:
            return {"reason": self.reason}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()
                if name != "reason"}  # fmt: skip


class NotHandled(Exception):
    """The reason is its text."""


def outcome_of(model_type: str) -> Outcome:
    """Run every check; a check that fails is an AssertionError, what awqkit refuses is a reason."""
    model = built(model_type)
    try:
        skeleton = Skeleton(model.config, WeightsOf(model))
        found = look_at(skeleton, CPU)
        _streams_exactly(model, skeleton, found)
        folds = folds_exactly(model, skeleton, found)
        with TemporaryDirectory() as folder:
            _loads_exactly(model, Path(folder))
    except AwqkitError as error:
        return Outcome(reason=_plain(error))
    distinct = list(dict.fromkeys(map(id, found.structures)))
    structures = {id(structure): structure for structure in found.structures}
    linears = tuple(len(structures[key].linears) for key in distinct)
    return Outcome(skeleton.num_blocks, linears, tuple(folds[key] for key in distinct))


def built(model_type: str) -> nn.Module:
    try:
        model = small_model(small_config(model_type, settings_by_hand().get(model_type, {})))
        logits(model)
    except Exception as error:  # the zoo's own limits, of as many kinds as there are architectures
        raise NotHandled(f"{NOT_BUILT}: {type(error).__name__}: {' '.join(str(error).split())[:120]}") from error
    return model


def _ids(rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY - 2, (rows, TOKENS), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=_ids(), use_cache=False).logits


def distance_of(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _streams_exactly(model: nn.Module, skeleton: Skeleton, found: Found) -> None:
    (started,) = skeleton.start([(_ids(), None)], CPU)
    hidden, beside = started.hidden, ()
    with torch.no_grad():
        for index, call in enumerate(started.calls):
            hidden, beside = hand_on(skeleton.load_block(index, CPU), hidden, call.given(beside))
            skeleton.release_block(index)
        with skeleton.head(CPU) as head:
            streamed = head(_ids(), hidden, None)
    distance = distance_of(streamed, logits(model))
    assert distance < STREAMED, f"streamed block by block the logits are {distance:.1e} away"


def folds_exactly(model: nn.Module, skeleton: Skeleton, found: Found) -> dict[int, int]:
    """Apply a random s to every proved fold in float64. Returns how many folds each structure has that are proved."""
    dtype = torch.float64 if _computes_in(model, torch.float64) else torch.float32
    original, folded = deepcopy(model).to(dtype), deepcopy(model).to(dtype)
    generator, proved = torch.Generator().manual_seed(0), {}
    for index, structure in enumerate(found.structures):
        block = skeleton.load_block(index, CPU)
        run = found.probe.runner(block, index)
        with torch.no_grad():
            exact = [
                fold
                for group in proved_together(structure)
                for fold, error in zip(
                    group, proof_errors(block, run, found.probe.hidden, structure, group), strict=True
                )
                if error <= PROOF_TOLERANCE
            ]
        skeleton.release_block(index)
        proved.setdefault(id(structure), len(exact))
        parameters = dict(folded.get_submodule(skeleton.block_path(index)).named_parameters())
        for fold in exact:
            _apply(fold, structure, parameters, generator)
    distance = distance_of(logits(folded), logits(original))
    assert distance < FOLDED[dtype], f"folded in {dtype} the logits are {distance:.1e} away"
    return proved


def _computes_in(model: nn.Module, dtype: torch.dtype) -> bool:
    try:
        logits(deepcopy(model).to(dtype))
    except RuntimeError:
        return False
    return True


def _apply(fold: Any, structure: BlockStructure, parameters: dict[str, Tensor], generator: torch.Generator) -> None:
    s = torch.exp(torch.empty(fold.num_channels, dtype=torch.float64).uniform_(-1.0, 1.0, generator=generator))
    s = torch.where(fold.read, s, 1.0)
    with torch.no_grad():
        rows = structure.linear(fold.producer_linear) if fold.producer_linear else None
        for name in fold.producer:
            value = matrix_of(parameters, name)
            value = rows.oriented(value) if rows and name == rows.weight else value
            along = s.reshape(-1, *(1,) * (value.dim() - 1))
            value.copy_((1.0 + value) / along - 1.0 if name == fold.offset else value / along)
        for consumer in fold.consumers:
            view = structure.linear(consumer)
            view.oriented(matrix_of(parameters, view.weight)).mul_(consumer_scale(s, fold.channel_of[consumer]))


def _loads_exactly(model: nn.Module, folder: Path) -> None:
    """Quantize a saved copy, load it, and hold it to the original with what was simulated in its places."""
    save_tiny(model, folder / "source")
    simulated: dict[str, Any] = {}
    quantize_block = pipeline_run.quantize_block

    def recorded(context: Any, *arguments: Any) -> Any:
        result = quantize_block(context, *arguments)
        path = context.block_plan.path
        structure = context.structure
        for name, value in result.stored.items():
            simulated[f"{path}.{name}"] = value.to(torch.bfloat16).float()  # as the file holds it
        for name, weight in result.quantized.items():
            view = structure.linear(name)
            simulated[f"{path}.{view.weight}"] = view.oriented(dequantize(weight.codes, weight.grid))
        return result

    with patch.object(pipeline_run, "quantize_block", recorded):
        done = quantize(
            folder / "source", folder / "out", Recipe.preset("fast"), calibration=_ids(ROWS, 1).tolist(),
            options=RunOptions(device="cpu"),
        )  # fmt: skip
    expected = deepcopy(model)
    parameters = dict(expected.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, value in simulated.items():
            matrix_of(parameters, name).copy_(value)
    loaded = load(done.directory, dtype=torch.float32, device="cpu")
    distance = distance_of(logits(loaded), logits(expected))
    assert distance < LOADED, f"loaded, the logits are {distance:.1e} away from the simulated ones"


def _plain(error: AwqkitError) -> str:
    """The reason without folders of this run."""
    words = [word if "/" not in word or not word.startswith("/") else "…" for word in str(error).split()]
    return " ".join(words)
