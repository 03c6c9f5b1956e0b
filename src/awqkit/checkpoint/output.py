"""Whether OUT may be written: every refusal that can be made before any work, and errors of the disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from awqkit.errors import OutputError

SPARE_BYTES = 64 * 2**20  # room for tokenizer, config and reports, and for the file system's own tables

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def refuse_output(out: Path, model_dir: Path | None, overwrite: bool) -> None:
    """Raises OutputError when OUT cannot be the result of a run on `model_dir`, None where no folder is read.

    Refused: OUT is MODEL, lies inside it or holds it; OUT is a file; OUT is a folder with content and
    `overwrite` is not set; with `overwrite`, a folder that does not look like a checkpoint; a parent that is
    missing or read-only.
    """
    if model_dir is not None:
        _refuse_overlap(out, model_dir)
    refuse_existing(out, overwrite)
    refuse_parent(out)


def _refuse_overlap(out: Path, model_dir: Path) -> None:
    real_out, real_model = Path(os.path.realpath(out)), Path(os.path.realpath(model_dir))
    if real_out == real_model:
        raise OutputError(f"{out}: OUT is MODEL itself; write to another folder")
    if real_model in real_out.parents:
        raise OutputError(f"{out}: OUT lies inside MODEL ({model_dir}); write to a folder outside it")
    if real_out in real_model.parents:
        raise OutputError(f"{out}: OUT holds MODEL ({model_dir}) inside it; write to another folder")


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Raises OutputError when something stands at OUT that may not be replaced. An empty folder may."""
    try:
        if not os.path.lexists(out):
            return
        if not out.is_dir():
            raise OutputError(f"{out}: exists and is not a folder; give another name")
        names = {path.name for path in out.iterdir()}
    except OSError as error:
        raise OutputError(f"{out}: cannot be looked at ({error.strerror or error})") from error
    if not names:
        return
    if not overwrite:
        raise OutputError(f"{out}: exists; give another name, or --overwrite to replace it")
    if "config.json" not in names:
        raise OutputError(
            f"{out}: exists and is no checkpoint (no config.json), so it is not replaced "
            "even with --overwrite; "
            "give another name or remove it yourself"
        )


def refuse_parent(out: Path) -> None:
    """Raises OutputError when the folder that OUT should appear in is missing or cannot be written."""
    parent = Path(os.path.realpath(out)).parent
    if not parent.is_dir():
        raise OutputError(f"{out}: the folder {parent} does not exist; create it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{out}: the folder {parent} cannot be written; choose another place or change its rights")


def refuse_full_disk(parent: Path, needed_bytes: int, what: str = "the checkpoint needs") -> None:
    """Raises OutputError when less than `needed_bytes` and 64 MiB are free where `parent` lies. what: for."""
    with disk_errors(parent):
        free_bytes = shutil.disk_usage(parent).free
    if free_bytes < needed_bytes + SPARE_BYTES:
        raise OutputError(
            f"{parent}: {free_bytes / 1e9:.2f} GB are free, {what} "
            f"{(needed_bytes + SPARE_BYTES) / 1e9:.2f} GB; free some space or write elsewhere"
        )


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turns an OSError of the body into an OutputError that names `where`, and a full disk by its name."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise OutputError(f"{where}: disk full; free some space and run again") from error
        raise OutputError(f"{where}: cannot be written ({error.strerror or error})") from error
