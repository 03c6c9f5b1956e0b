"""The safetensors file header, read and written without touching the tensor data.

    8 bytes little-endian length n | n bytes JSON {name: {dtype, shape, data_offsets}} | tensor data

Offsets count from the end of the header; the data has no holes and fills the file. A header comes from
somebody else's file, so every number in it is checked before it is used. Knows no tensor name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from awqkit.errors import CheckpointError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
DATA_ALIGNMENT = 8  # readers map the file and view it as the tensor's dtype

_GIT_LFS_MAGIC = b"version https://git-lfs"
_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is known of a tensor before its values: name on disk, dtype, shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's place: `spec.num_bytes` bytes of `file` from `offset`, counted from the file's start."""

    spec: TensorSpec
    file: Path
    offset: int


def encode_header(specs: Sequence[TensorSpec]) -> tuple[bytes, tuple[int, ...]]:
    """Length field and header of a file that holds `specs` in this order, and each tensor's offset in it.

    Equal specs give equal bytes. Padded with spaces, so that the data starts on a multiple of 8.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers wants the key
    starts, end = [], 0
    for spec in specs:
        start, end = end, end + spec.num_bytes
        starts.append(start)
        entries[spec.name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(LENGTH_BYTES + len(text)) % DATA_ALIGNMENT)
    header = len(text).to_bytes(LENGTH_BYTES, "little") + text
    return header, tuple(len(header) + start for start in starts)


def read_header(file: Path) -> tuple[StoredTensor, ...]:
    """The tensors of a safetensors file, in the order of their data.

    Raises CheckpointError when the file cannot be opened, is truncated, or its header contradicts itself or
    the file.
    """
    try:
        file_bytes = file.stat().st_size
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(_length_field(file, stream.read(32), file_bytes), "little")
            data_start = LENGTH_BYTES + header_bytes
            if header_bytes > MAX_HEADER_BYTES:
                raise _corrupt(file, f"the header claims {header_bytes} bytes, more than {MAX_HEADER_BYTES} allowed")
            if data_start > file_bytes:
                raise _truncated(file, f"the header alone needs {data_start} bytes, the file has {file_bytes}")
            stream.seek(LENGTH_BYTES)
            text = stream.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from error
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _corrupt(file, "the header is not JSON") from error
    if not isinstance(entries, dict):
        raise _corrupt(file, "the header is not a JSON object")
    entries.pop("__metadata__", None)
    stored = [_entry(file, data_start, name, entry) for name, entry in entries.items()]
    stored.sort(key=lambda tensor: (tensor.offset, tensor.spec.num_bytes))
    _check_no_holes(file, stored, data_start, file_bytes)
    return tuple(stored)


def _length_field(file: Path, start: bytes, file_bytes: int) -> bytes:
    if start.startswith(_GIT_LFS_MAGIC):
        raise CheckpointError(f"{file}: is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    if file_bytes < LENGTH_BYTES:
        raise _truncated(file, f"a safetensors file has at least {LENGTH_BYTES} bytes, this one has {file_bytes}")
    return start[:LENGTH_BYTES]


def _entry(file: Path, data_start: int, name: str, entry: Any) -> StoredTensor:
    try:
        code, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise _corrupt(file, f"tensor {name!r} lacks dtype, shape or data_offsets") from error
    if not isinstance(shape, list) or not all(_is_size(number) for number in [*shape, start, end]):
        raise _corrupt(file, f"tensor {name!r} has shape {shape} at {start}..{end}: not whole numbers from 0")
    dtype = _DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise CheckpointError(
            f"{file}: tensor {name!r} has dtype {code!r}, which cannot be read; known are {', '.join(_DTYPES)}"
        )
    spec = TensorSpec(name, dtype, tuple(shape))
    if end - start != spec.num_bytes:
        raise _corrupt(
            file,
            f"tensor {name!r}, {code} {shape}, needs {spec.num_bytes} bytes, its offsets give {end - start}",
        )
    return StoredTensor(spec, file, data_start + start)


def _check_no_holes(file: Path, stored: Sequence[StoredTensor], data_start: int, file_bytes: int) -> None:
    end = data_start
    for tensor in stored:
        if tensor.offset != end:
            raise _corrupt(file, f"tensor {tensor.spec.name!r} starts at byte {tensor.offset}, expected {end}")
        end += tensor.spec.num_bytes
    if end > file_bytes:
        raise _truncated(file, f"its tensors need {end} bytes, the file has {file_bytes}")
    if end < file_bytes:
        raise _corrupt(file, f"its tensors end at byte {end}, the file has {file_bytes}")


def _is_size(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def _truncated(file: Path, detail: str) -> CheckpointError:
    return CheckpointError(f"{file}: truncated: {detail}; fetch or copy this file again")


def _corrupt(file: Path, detail: str) -> CheckpointError:
    return CheckpointError(f"{file}: not a sound safetensors file: {detail}; fetch or copy this file again")
