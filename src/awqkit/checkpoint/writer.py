"""A checkpoint written tensor by tensor into a temporary sibling of OUT, and renamed to OUT when whole.

The layout is known before the work starts: headers are written first, then each tensor goes to its place in
any order, so the peak memory is one tensor. Until `commit` nothing stands at OUT, and leaving early leaves
nothing.

    with CheckpointWriter(out, plan_layout(specs), overwrite=False) as writer:
        writer.write(name, tensor)      # once for each spec
        writer.write_json("config.json", config)
        writer.commit()
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from awqkit.checkpoint.header import TensorSpec, encode_header
from awqkit.checkpoint.output import DISK_FULL, disk_errors, refuse_existing, refuse_full_disk, refuse_parent
from awqkit.checkpoint.reader import INDEX_FILE, SINGLE_FILE
from awqkit.checkpoint.sync import sync_file, sync_folder
from awqkit.errors import OutputError

MAX_SHARD_BYTES = 5_000_000_000  # the hub's and transformers' custom


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: its header, the tensors in the order of their data, and the byte where each begins."""

    file_name: str
    header: bytes
    specs: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return len(self.header) + sum(spec.num_bytes for spec in self.specs)


@dataclass(frozen=True, slots=True)
class Layout:
    """Which tensor goes to which place of which shard."""

    shards: tuple[Shard, ...]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(spec.num_bytes for shard in self.shards for spec in shard.specs)

    @property
    def file_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.file_bytes for shard in self.shards)

    def index(self) -> dict[str, Any]:
        """What model.safetensors.index.json says."""
        weight_map = {spec.name: shard.file_name for shard in self.shards for spec in shard.specs}
        return {"metadata": {"total_size": self.tensor_bytes}, "weight_map": dict(sorted(weight_map.items()))}


def plan_layout(specs: Sequence[TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES) -> Layout:
    """The files that hold `specs`, filled in the order given; a tensor larger than a shard has one to itself.

    Equal specs give equal bytes. Raises ValueError for a name that is given twice.
    """
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names):
        raise ValueError(f"tensor names given twice: {sorted({name for name in names if names.count(name) > 1})}")
    groups: list[list[TensorSpec]] = [[]]
    filled_bytes = 0
    for spec in specs:
        if groups[-1] and filled_bytes + spec.num_bytes > max_shard_bytes:
            groups.append([])
            filled_bytes = 0
        groups[-1].append(spec)
        filled_bytes += spec.num_bytes
    if len(groups) == 1:
        return Layout((_plan_shard(SINGLE_FILE, groups[0]),))
    count = len(groups)
    return Layout(
        tuple(_plan_shard(f"model-{i:05d}-of-{count:05d}.safetensors", group) for i, group in enumerate(groups, 1))
    )


def _plan_shard(file_name: str, specs: Sequence[TensorSpec]) -> Shard:
    # Wide dtypes first (a stable sort): readers view the mapped file as the dtype, which needs aligned
    # offsets, and the format allows no padding between tensors.
    ordered = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    header, offsets = encode_header(ordered)
    return Shard(file_name, header, tuple(ordered), offsets)


class CheckpointWriter:
    """The one way to write a checkpoint; a context manager, see the module's docstring.

    Entering checks OUT, its parent and the free space, then creates the temporary folder with all shards at
    full size. Every problem with the place or the disk is an OutputError; misuse by our own code is a
    ValueError.

    folder: in the place of a temporary one, and left where it is without `commit`. written: what an earlier writer left
    in it, as `checksums` gave it; it is compared with the disk, but for what has None. spare_bytes: that must be free
    beside the checkpoint.
    """

    def __init__(
        self,
        out: Path,
        layout: Layout,
        overwrite: bool,
        *,
        folder: Path | None = None,
        written: Mapping[str, int | None] | None = None,
        spare_bytes: int = 0,
    ) -> None:
        self._out = Path(os.path.realpath(out))  # where OUT is a link, what it points to is replaced
        self._layout = layout
        self._overwrite = overwrite
        self._places = {
            spec.name: (spec, shard.file_name, offset)
            for shard in layout.shards
            for spec, offset in zip(shard.specs, shard.offsets, strict=True)
        }
        self._pending = set(self._places)
        self._given, self._written, self._spare_bytes = folder, dict(written or {}), spare_bytes
        self._folder: Path | None = None
        self._unsynced: set[str] = set()

    @property
    def folder(self) -> Path:
        """The temporary folder. Raises ValueError outside the `with` block and after `commit`."""
        if self._folder is None:
            raise ValueError("the checkpoint writer is not open")
        return self._folder

    def __enter__(self) -> CheckpointWriter:
        refuse_existing(self._out, self._overwrite)
        refuse_parent(self._out)
        if self._written:
            self._folder = self._given
            self._check_written()
            return self
        refuse_full_disk(self._out.parent, self._layout.file_bytes + self._spare_bytes)
        try:
            self._folder = self._given or _make_sibling(self._out, "awqkit")
            for shard in self._layout.shards:
                with disk_errors(self._out):
                    _preallocate(self._folder / shard.file_name, shard)
            if len(self._layout.shards) > 1:
                self.write_json(INDEX_FILE, self._layout.index())
        except BaseException:
            self._remove_folder()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove_folder()

    def write(self, name: str, tensor: Tensor) -> None:
        """Puts `tensor` at its place. Raises ValueError unless it is planned as it is, and new."""
        if name not in self._pending:
            raise ValueError(
                f"tensor {name!r} is " + ("written twice" if name in self._places else "not in the layout")
            )
        self._put(name, tensor)
        self._pending.remove(name)

    def rewrite(self, name: str, tensor: Tensor) -> None:
        """Puts `tensor` in the place of one that was written. Raises ValueError where none was."""
        if name not in self._places or name in self._pending:
            raise ValueError(f"tensor {name!r} was not written, so it cannot be written again")
        self._put(name, tensor)

    def _put(self, name: str, tensor: Tensor) -> None:
        spec, file_name, offset = self._places[name]
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise ValueError(
                f"tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}, the layout has {spec.dtype} {spec.shape}"
            )
        data = memoryview(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy())
        with disk_errors(self._out), (self.folder / file_name).open("r+b") as stream:
            stream.seek(offset)
            stream.write(data)
        self._written[name] = zlib.crc32(data)
        self._unsynced.add(file_name)

    def has(self, name: str) -> bool:
        """Whether the tensor is written."""
        return name in self._places and name not in self._pending

    def checksums(self) -> dict[str, int | None]:
        """Name -> CRC-32 of every tensor that is written, once all of them are durable."""
        with disk_errors(self._out):
            for file_name in sorted(self._unsynced):
                sync_file(self.folder / file_name)
            sync_folder(self.folder)
        self._unsynced.clear()
        return dict(self._written)

    def _check_written(self) -> None:
        for name, checksum in self._written.items():
            self._pending.discard(name)
            if checksum is None:
                continue
            spec, file_name, offset = self._places[name]
            try:
                with (self.folder / file_name).open("rb") as stream:
                    stream.seek(offset)
                    found = zlib.crc32(stream.read(spec.num_bytes))
            except OSError as error:
                raise OutputError(
                    f"{self.folder / file_name}: of the stopped run that is kept, cannot be read "
                    f"({error.strerror or error}); --restart throws it away"
                ) from error
            if found != checksum:
                raise OutputError(
                    f"{self._out}: tensor {name} of the stopped run that is kept has changed on the disk; --restart "
                    "throws it away"
                )

    def write_text(self, name: str, text: str) -> None:
        """Writes `text` as file `name`, UTF-8 with plain newlines."""
        with disk_errors(self._out):
            (self.folder / name).write_bytes(text.encode("utf-8"))

    def write_json(self, name: str, value: Any) -> None:
        """Writes `value` as JSON file `name`, keys in the order given."""
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def copy_file(self, source: Path, name: str) -> None:
        """Copies the content of file `source` to `name`, relative to OUT; links are followed."""
        with disk_errors(self._out):
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def commit(self) -> None:
        """Makes the checkpoint durable, renames it to OUT. Raises ValueError when a tensor is missing."""
        if self._pending:
            raise ValueError(f"{len(self._pending)} planned tensors were not written, {min(self._pending)!r} for one")
        refuse_existing(self._out, self._overwrite)
        with disk_errors(self._out):
            _sync_tree(self.folder)
            _replace(self.folder, self._out)
        self._folder = None

    def _remove_folder(self) -> None:
        if self._folder is not None and self._given is None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def _make_sibling(out: Path, tag: str) -> Path:
    """A new hidden folder beside OUT, with the process in its name; a number follows where that is taken."""
    with disk_errors(out):
        for attempt in range(1000):
            folder = out.with_name(f".{out.name}.{tag}-{os.getpid()}" + (f"-{attempt}" if attempt else ""))
            try:
                folder.mkdir()
            except FileExistsError:  # left by a killed run, or in use by a run in another container
                continue
            return folder
    raise OutputError(f"{out}: too many folders named .{out.name}.{tag}-*; remove those of killed runs")


def _preallocate(file: Path, shard: Shard) -> None:
    with file.open("wb") as stream:
        stream.write(shard.header)
        stream.flush()
        try:
            os.posix_fallocate(stream.fileno(), 0, shard.file_bytes)  # a full disk shows now, not hours later
        except AttributeError:  # macOS and Windows have no such call
            pass
        except OSError as error:
            if error.errno in DISK_FULL:
                raise
        stream.truncate(shard.file_bytes)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            sync_file(path)
    sync_folder(folder)


def _replace(folder: Path, out: Path) -> None:
    """Renames `folder` to OUT; what stood there is moved aside, and removed once the new one stands."""
    old = None
    if out.is_dir():
        old = _make_sibling(out, "awqkit-old")
        old.rmdir()  # only its free name was wanted
        out.replace(old)
    try:
        folder.replace(out)
    except BaseException:
        if old is not None:
            old.replace(out)
        raise
    sync_folder(out.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
