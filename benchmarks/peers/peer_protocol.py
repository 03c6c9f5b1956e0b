"""What the peer scripts share: their arguments, the float32 checkpoint that they write, and the figures they return.

Runs in the peer's own environment, so it imports torch and transformers and nothing of awqkit. It knows no tool.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import resource
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

WEIGHT_FILES = (".safetensors", ".bin", ".index.json", ".gguf")


@dataclass(frozen=True)
class Task:
    """One quantization that the benchmark asks of a peer."""

    model: Path
    rows: torch.Tensor  # [rows, tokens] int64, the calibration tokens as they are to be used
    out: Path
    bits: int
    group_size: int
    method: str
    device: str  # "cpu" or "cuda"
    json: Path


def read_task(methods: tuple[str, ...]) -> Task:
    """The task on the command line, rows read. Exits with argparse's message when an argument is wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True, help="JSON: a list of equally long lists of token ids")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--method", choices=methods, default=methods[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    rows = json.loads(args.rows.read_text(encoding="utf-8"))
    lengths = {len(row) for row in rows}
    if len(lengths) != 1:
        parser.error(f"{args.rows}: expected rows of one length, found the lengths {sorted(lengths)}")
    return Task(**{**vars(args), "rows": torch.tensor(rows, dtype=torch.long)})


def load_original(task: Task) -> torch.nn.Module:
    """The model in its checkpoint's own dtype, on the CPU: each tool moves it where it wants it."""
    return AutoModelForCausalLM.from_pretrained(task.model, dtype="auto").eval()


def codes_of(weight: torch.Tensor, group_scale: torch.Tensor, group_zero: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes [out, in] that a tool chose, read back in float32 from the rounded (q - z) Δ that it left as `weight`.

    weight: [out, in], rounded to 8 bits of mantissa at worst: an error of at most 2⁻⁸ · 15 Δ at 4 bits, far below Δ / 2
    (it holds up to 6 bits).
    group_scale, group_zero: [out, groups]. Raises ValueError when `weight` is not on that grid.
    """
    scale, zero = _by_column(group_scale, weight), _by_column(group_zero, weight)
    codes = torch.round(weight.float() / scale + zero).clamp(0, 2**bits - 1)
    off = ((codes - zero) * scale - weight.float()).abs() - weight.float().abs() / 128
    if (off > scale / 1000).any():
        raise ValueError("the weight that the tool left is not on the grid of its own scales and zero points")
    return codes


def dequantized(codes: torch.Tensor, group_scale: torch.Tensor, group_zero: torch.Tensor) -> torch.Tensor:
    """(q - z) Δ in float32, [out, in], from codes [out, in] and group_scale, group_zero [out, groups]."""
    return (codes.float() - _by_column(group_zero, codes)) * _by_column(group_scale, codes)


def _by_column(per_group: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[out, groups] as float32 [out, in]: each group's value at each of its columns."""
    per_group = per_group.to(device=like.device, dtype=torch.float32)
    return per_group.repeat_interleave(like.shape[1] // per_group.shape[1], dim=1)


def write_checkpoint(task: Task, linears: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> None:
    """Write `task.out`: the original's tensors by name, in float32, with every value from the tool.

    `linears` maps a parameter name to its dequantized weight, `others` is the tool's state dict, for everything else
    (norms into which scales were folded among them). The config is the original's own, since the tool's library may
    not know all of it. Raises KeyError when a tensor of the original is in neither.
    """
    task.out.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path in sorted(task.model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as source:
            for name in source.keys():  # noqa: SIM118 (no mapping)
                value = linears[name] if name in linears else others[name]
                value = value.detach().to(device="cpu", dtype=torch.float32)
                tensors[name] = value.reshape(source.get_slice(name).get_shape()).contiguous()
    save_file(tensors, task.out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((task.model / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    (task.out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=1), encoding="utf-8")
    for path in task.model.iterdir():
        if path.is_file() and path.name != "config.json" and not path.name.endswith(WEIGHT_FILES):
            shutil.copy(path, task.out / path.name)


class Clock:
    """Seconds from here to `stop`: loading the model and quantizing it, without imports and without writing."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        self._began = time.monotonic()
        self.seconds = 0.0

    def stop(self) -> None:
        """Hold the time, all work on the device done."""
        if self._cuda:
            torch.cuda.synchronize()
        self.seconds = time.monotonic() - self._began


def write_result(task: Task, clock: Clock, packages: tuple[str, ...], quantized: int, notes: str) -> None:
    """Write `task.json`: seconds, peak memory in bytes, versions, the number of quantized linears, what was set."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", *packages)}
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    result = {
        "method": task.method,
        "seconds": round(clock.seconds, 2),
        "peak_host_bytes": host,
        "peak_device_bytes": torch.cuda.max_memory_allocated() if task.device == "cuda" else None,
        "device": torch.cuda.get_device_name() if task.device == "cuda" else platform.processor(),
        "versions": {"python": platform.python_version(), **versions},
        "quantized_linears": quantized,
        "rows": list(task.rows.shape),
        "notes": notes,
    }
    task.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
