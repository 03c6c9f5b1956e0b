"""A model folder, opened: its config, where each tensor lies, and the tensors one by one.

`Checkpoint.open` reads config.json and the safetensors headers, and finds whatever is wrong with them before
any work starts. `read` copies one tensor from the file into memory of its own: nothing stays mapped, so a
large shard never counts as resident. Does not know what a tensor means.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awqkit.checkpoint.header import StoredTensor, TensorSpec, read_header
from awqkit.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"

# What goes along with the weights unchanged; everything else in the folder is left where it is.
_COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "tekken.json"),
    *(
        "*.model",
        "*.tiktoken",
        "generation_config.json",
        "chat_template*",
        "additional_chat_templates/*.jinja",
    ),
    *("*preprocessor_config.json", "*processor_config.json", "*.py"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_WEIGHT_SUFFIXES = (*_PICKLE_SUFFIXES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx")
_QUANTIZED_KEYS = ("quantization_config", "compression_config")
_QUANTIZED_FILES = ("quantize_config.json", "quant_config.json")


@dataclass(frozen=True, slots=True)
class Derived:
    """A tensor that is computed from stored ones when it is read. parts: their names; compute: from them by name."""

    spec: TensorSpec
    parts: tuple[str, ...]
    compute: Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A local model folder with safetensors weights.

    config: config.json as it is. tensors: name -> dtype, shape and place, in the order of the data. derived: those of
    them that are computed from what lies on disk.
    """

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    derived: Mapping[str, Derived] = field(default_factory=dict)
    _on_disk: Mapping[str, StoredTensor] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: Path, *, of_known_class: bool = True) -> Checkpoint:
        """The model folder `directory`; reads config and headers, no tensor data. Raises CheckpointError.

        of_known_class: whether config.json must name the model's class.
        """
        files = _list_folder(directory)
        if INDEX_FILE in files and SINGLE_FILE not in files:
            tensors = _read_sharded(directory)
        else:
            tensors = read_header(directory / _single_file(directory, files))
        return cls(directory, _read_config(directory, of_known_class), {tensor.spec.name: tensor for tensor in tensors})

    def with_derived(self, derived: Iterable[Derived], config: Mapping[str, Any]) -> Checkpoint:
        """The same folder with `config` in the place of its own, and tensors in the place of their parts."""
        by_name = {each.spec.name: each for each in derived}
        goes_into = {part: name for name, each in by_name.items() for part in each.parts}
        tensors: dict[str, StoredTensor] = {}
        for name, stored in self.tensors.items():
            into = goes_into.get(name)
            if into is None:
                tensors[name] = stored
            elif into not in tensors:  # in the place of its first part
                tensors[into] = replace(stored, spec=by_name[into].spec)
        return Checkpoint(self.directory, config, tensors, by_name, self.tensors)

    @property
    def hidden(self) -> dict[str, str]:
        """Name on disk -> the derived tensor it goes into, for all that is no tensor by itself."""
        return {part: name for name, each in self.derived.items() for part in each.parts if part != name}

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """Every tensor as it lies on the disk."""
        return tuple((self._on_disk or self.tensors).values())

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, file by file in the order of the data."""
        return tuple(self.tensors)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(tensor.spec.num_bytes for tensor in (self._on_disk or self.tensors).values())

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype of tensor `name`. Raises CheckpointError for an unknown name."""
        return self._stored(name).spec.dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`. Raises CheckpointError for an unknown name."""
        return self._stored(name).spec.shape

    def stored_bytes(self, name: str) -> int:
        """Bytes on disk of tensor `name`, of all its parts where it is derived. Raises CheckpointError."""
        if name in self.derived:
            return sum(self._on_disk[part].spec.num_bytes for part in self.derived[name].parts)
        return self._stored(name).spec.num_bytes

    def read(self, name: str) -> Tensor:
        """Tensor `name` on the CPU, in its stored dtype, in memory of its own. Raises CheckpointError."""
        derived = self.derived.get(name)
        if derived is None:
            return self._read(self._stored(name))
        computed = derived.compute({part: self._read(self._on_disk[part]) for part in derived.parts})
        return computed.to(derived.spec.dtype)

    def _read(self, stored: StoredTensor) -> Tensor:
        # A plain read, no memory map: a mapped shard would count as resident while it is open.
        buffer = torch.empty(stored.spec.num_bytes, dtype=torch.uint8)
        try:
            with stored.file.open("rb", buffering=0) as stream:
                stream.seek(stored.offset)
                _fill(memoryview(buffer.numpy()), stream, stored)
        except OSError as error:
            raise CheckpointError(f"{stored.file}: cannot be read ({error.strerror or error})") from error
        return buffer.view(stored.spec.dtype).reshape(stored.spec.shape)

    def read_many(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Several tensors by name, see `read`."""
        return {name: self.read(name) for name in names}

    def other_files(self) -> tuple[str, ...]:
        """Names, relative to `directory`, of what belongs to the model beside weights and config.json.

        Tokenizer, generation and processor configs, chat templates, remote code, license; never pickles.
        """
        found = [path for path in [*self.directory.iterdir(), *self.directory.glob("*/*")] if path.is_file()]
        names = sorted(path.relative_to(self.directory).as_posix() for path in found)
        return tuple(name for name in names if _is_companion(name))

    def _stored(self, name: str) -> StoredTensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.directory}: has no tensor {name!r} among its {len(self.tensors)}") from None


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError when the checkpoint is quantized already: more rounding would only harm."""
    places = {"": checkpoint.config}
    places |= {f"{key}.": value for key, value in checkpoint.config.items() if isinstance(value, Mapping)}
    for prefix, config in places.items():
        for key in _QUANTIZED_KEYS:
            if config.get(key):
                settings = config[key]
                method = settings.get("quant_method", "unknown") if isinstance(settings, Mapping) else "unknown"
                raise _quantized(checkpoint.directory / CONFIG_FILE, f"has {prefix}{key} (method {method!r})")
    for name in _QUANTIZED_FILES:
        if (checkpoint.directory / name).is_file():
            raise _quantized(checkpoint.directory, f"holds {name}")


def _quantized(where: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: {found}: the model is quantized already; give the original bf16, fp16 or fp32 one "
        "(or one in fp8 or compressed-tensors)"
    )


def _list_folder(directory: Path) -> frozenset[str]:
    if not directory.exists():
        raise CheckpointError(f"{directory}: no such directory; expected a folder with config.json and *.safetensors")
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: is a file; give the folder that holds config.json and *.safetensors")
    try:
        files = frozenset(path.name for path in directory.iterdir())
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read ({error.strerror or error})") from error
    if not files:
        raise CheckpointError(f"{directory}: is empty; expected config.json and *.safetensors")
    return files


def _single_file(directory: Path, files: Iterable[str]) -> str:
    if SINGLE_FILE in files:
        return SINGLE_FILE
    found = sorted(name for name in files if name.endswith(".safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{directory}: holds {len(found)} safetensors files ({found[0]} ...) but no {INDEX_FILE} "
            "that says which tensor is where; fetch the index too"
        )
    pickles = sorted(name for name in files if name.endswith(_PICKLE_SUFFIXES))
    if pickles:
        raise CheckpointError(
            f"{directory}: holds pickled weights only ({pickles[0]}), which can run code when opened; "
            "convert them to safetensors first (transformers: from_pretrained, then save_pretrained)"
        )
    raise CheckpointError(
        f"{directory}: holds no *.safetensors file; expected {SINGLE_FILE} or {INDEX_FILE} with its shards"
    )


def _read_config(directory: Path, of_known_class: bool) -> dict[str, Any]:
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(f"{directory}: holds no {CONFIG_FILE}; copy it from where the weights come from")
    config = _read_json_object(file)
    architectures = config.get("architectures")
    if of_known_class and (not isinstance(architectures, list) or not architectures):
        if config.get("quantization_config"):
            raise CheckpointError(
                f'{file}: has no "architectures": these are quantized weights of a plain module, '
                "awqkit.load(DIR, into=MODULE) fills one of its class"
            )
        raise CheckpointError(
            f'{file}: has no "architectures", so the model class is not known; '
            'add it, for example "architectures": ["LlamaForCausalLM"]'
        )
    return config


def _read_json_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not JSON ({error}); fetch or copy this file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: holds a JSON {type(value).__name__}, expected an object")
    return value


def _read_sharded(directory: Path) -> Sequence[StoredTensor]:
    file = directory / INDEX_FILE
    weight_map = _read_json_object(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{file}: has no "weight_map" from tensor names to shards; fetch this file again')
    tensors: list[StoredTensor] = []
    for shard in sorted({str(shard) for shard in weight_map.values()}):
        # An index comes from somebody else: a shard is a plain name, never a way out of the folder.
        if Path(shard).name != shard or not (directory / shard).is_file():
            raise CheckpointError(f"{file}: names the shard {shard!r}, which is not in the folder; fetch it too")
        wanted = {name for name, home in weight_map.items() if home == shard}
        stored = [tensor for tensor in read_header(directory / shard) if tensor.spec.name in wanted]
        missing = wanted - {tensor.spec.name for tensor in stored}
        if missing:
            raise CheckpointError(
                f"{directory / shard}: lacks tensor {min(missing)!r} that {INDEX_FILE} places in it; "
                "index and shards are not of one model, fetch both again"
            )
        tensors += stored
    return tensors


def _fill(target: memoryview, stream: Any, stored: StoredTensor) -> None:
    done = 0
    while done < len(target):  # one read call returns at most 2 GiB
        count = stream.readinto(target[done:])
        if not count:
            raise CheckpointError(
                f"{stored.file}: ends inside tensor {stored.spec.name!r} ({done} of {len(target)} bytes): "
                "the file changed since it was opened"
            )
        done += count


def _is_companion(name: str) -> bool:
    if name.endswith(_WEIGHT_SUFFIXES) or name == CONFIG_FILE:
        return False
    patterns = [pattern for pattern in _COMPANIONS if ("/" in pattern) == ("/" in name)]
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
