"""From what a user calls a model to a local folder: a directory, or an id on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from awqkit.errors import CheckpointError

PROBE_SECONDS = 5.0  # a hub that does not answer within this time is taken as out of reach

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_WANTED = [
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.py",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
]
_UNWANTED = ["*/*.safetensors", "consolidated*"]  # second copies of the weights in other layouts


def resolve_model(model: str | Path, *, show_progress: bool = True, weights: bool = True) -> Path:
    """The local folder of `model`: an existing directory, or a hub id fetched into the hub's cache.

    An absolute path, or one that starts with a dot or `~`, is never looked up on the hub. Without a network a
    model that is in the cache is found there. show_progress: let the hub's client draw its bars on a
    terminal. weights: whether they are wanted, or only config, code and tokenizer. Raises CheckpointError, within
    seconds where the hub is out of reach.
    """
    path = Path(os.path.expanduser(model))  # noqa: PTH111 - leaves an unknown ~user as it is, without an error
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{model}: is a file; give the folder that holds config.json and *.safetensors")
    hub_id = str(model)
    if path.is_absolute() or hub_id.startswith((".", "~")) or not _HUB_ID.fullmatch(hub_id):
        raise CheckpointError(f"{model}: no such directory; expected a folder with config.json and *.safetensors")
    quiet = not show_progress and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        return _fetch(hub_id, weights)
    except Exception as error:  # the client raises errors of its own, httpx's, OSError and ValueError
        raise CheckpointError(
            f"{model}: no such directory, and the Hugging Face hub could not give "
            f"a model of that name: {_reason(error)}"
        ) from error
    finally:
        if quiet:
            enable_progress_bars()


def _fetch(hub_id: str, weights: bool) -> Path:
    # snapshot_download has no short time-out of its own for the first question, so it is asked here.
    try:
        HfApi().repo_info(hub_id, timeout=PROBE_SECONDS)
        offline = False
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError):
        raise
    except Exception:  # out of reach, in whatever way: the cache may still have it
        offline = True
    unwanted = _UNWANTED if weights else [*_UNWANTED, "*.safetensors"]
    folder = snapshot_download(hub_id, allow_patterns=_WANTED, ignore_patterns=unwanted, local_files_only=offline)
    return Path(folder)


def _reason(error: Exception) -> str:
    if isinstance(error, hub_errors.GatedRepoError):
        return "it is gated; accept its license on the hub and log in with `hf auth login`"
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return "there is none, or it is private and needs `hf auth login`"
    if isinstance(error, hub_errors.LocalEntryNotFoundError):
        return "it cannot be reached, and its cache on this machine holds no complete copy"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
