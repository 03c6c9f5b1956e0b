"""What must be the same for a stopped run to go on, and what should be."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any

import torch

from awqkit.api.given_model import GivenModel
from awqkit.checkpoint.reader import Checkpoint
from awqkit.checkpoint.run_state import DIGEST
from awqkit.checkpoint.tensor_source import TensorSource
from awqkit.errors import CheckpointError
from awqkit.pipeline.activations import TokenRows
from awqkit.recipe import Recipe


def fingerprint(
    given: GivenModel, recipe: Recipe, rows: TokenRows | None, held_out: TokenRows | None, version: str
) -> dict[str, Any]:
    """Item -> value; where one differs the run would write other bytes. version: of awqkit.

    A file of a model folder is known by its size and the time when it was changed, a tensor in memory by what it holds.
    """
    model = _tensors(given.source) if given.folder is None else _files(given.folder)
    return {
        "awqkit": version,
        "recipe": recipe.to_dict(),
        **model,
        "calibration text": _digest(*(_bytes(part) for part in (rows, held_out) if part is not None)),
    }


def refuse_changed(given: GivenModel, known: Mapping[str, Any]) -> None:
    """Raises CheckpointError where a file of a model folder is no longer the one that `fingerprint` saw."""
    if given.folder is None:
        return
    before, now = known["model files"], _files(given.folder)["model files"]
    changed = [name for name in before if before[name] != now[name]]
    if changed:
        raise CheckpointError(
            f"{given.folder.directory / changed[0]}: changed while the run read it, so what was written is of two "
            "models; run again once the model is as it should be"
        )


def _files(folder: Checkpoint) -> dict[str, Any]:
    files = {}
    for file in sorted({tensor.file for tensor in folder.stored}):
        try:
            found = file.stat()
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be looked at ({error.strerror or error})") from error
        files[file.name] = [found.st_size, found.st_mtime_ns]
    config = json.dumps(folder.config, sort_keys=True, default=str).encode()
    return {"model files": files, "config.json": _digest(config)}


def _tensors(source: TensorSource) -> dict[str, Any]:
    def checksum(name: str) -> list[Any]:
        data = source.read(name).reshape(-1).view(torch.uint8).numpy()
        return [list(source.shape(name)), zlib.crc32(memoryview(data))]

    return {"tensors": {name: checksum(name) for name in source.names}}


def environment(device: torch.device, versions: Mapping[str, str]) -> dict[str, str]:
    """What the last bits of floating point may depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {"device": name, **{key: value for key, value in versions.items() if key in ("torch", "transformers")}}


def changed_environment(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """What to tell where a run goes on in another environment; None where it is the same."""
    differs = [f"{key} was {before.get(key)}, is {value}" for key, value in now.items() if before.get(key) != value]
    if not differs:
        return None
    return (
        f"the stopped run goes on elsewhere ({'; '.join(differs)}): its last bits may not be those of an unbroken one"
    )


def _bytes(rows: TokenRows) -> bytes:
    mask = b"" if rows.mask is None else rows.mask.numpy().tobytes()
    return str(tuple(rows.ids.shape)).encode() + rows.ids.numpy().tobytes() + mask


def _digest(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return f"{DIGEST}{found.hexdigest()[:16]}"
