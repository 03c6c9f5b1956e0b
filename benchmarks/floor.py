"""Seconds of a whole `quantize` run per preset, as multiples of one plain float32 forward pass over the same tokens.

    python benchmarks/floor.py                              fast, balanced, best on the CPU, 128 rows of 512 tokens
    python benchmarks/floor.py --presets best --samples 64 --name floor-cpu-best      a preset by itself, on fewer rows

Everything runs in one process, a forward pass before and after every preset; model loading is left out of it, while
`quantize` is timed with everything. A multiple is taken of the faster of the two passes around it. Wall time is what
the bars are about; where others use the machine, the CPU time of the process (all its threads) is the steadier figure.
Fewer rows make a multiple larger, since the search costs the same for any number of rows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench import DATA, RESULTS, environment, save, text_files, write
from torch import Tensor, nn

from awqkit import Recipe, RunOptions, quantize
from awqkit.api.device import choose_device
from awqkit.api.smollm2 import smollm2
from awqkit.calibration.rows import pack_rows
from awqkit.calibration.sources import read_documents
from awqkit.checkpoint.reader import Checkpoint
from awqkit.evaluation.load import load_checkpoint
from awqkit.model.transformers_bridge import load_text_encoder

SEQ_LEN, GROUP_SIZE = 512, 64
TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 32768}
BARS = {"fast": 3.0, "balanced": 8.0, "best": 60.0}  # issue 13: forward passes that a run may take on a CPU


@dataclass(frozen=True)
class Spent:
    """Seconds of the clock, and of this process on all its threads."""

    wall: float
    cpu: float


class Clock:
    """Measures from its making."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def spent(self, device: torch.device) -> Spent:
        """Since then, all work on the device done."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return Spent(time.monotonic() - self._wall, time.process_time() - self._cpu)


def main() -> None:
    """Time every preset between two forward passes; the JSON is written after each."""
    args = _arguments()
    calibration, device = text_files(args.data)["calibration"], choose_device(args.device)
    model = args.model or smollm2(args.gguf, emit=print)
    rows = _rows(model, calibration, args.samples)
    decoder = load_checkpoint(Checkpoint.open(model), torch.float32, device).base_model
    head = {"environment": environment(device), "model": model.name, "samples": args.samples, "tokens": rows.numel()}
    runs: list[dict[str, Any]] = []
    before = forward(decoder, rows, device)
    for preset in args.presets:
        spent, stages = _quantize(model, preset, calibration, args.samples, device)
        after = forward(decoder, rows, device)
        runs.append(compared(preset, before, after, spent) | {"stages": stages})
        print(verdict(runs[-1]), flush=True)
        write(args.name, {**head, "runs": runs}, args.results)
        before = after
    save(args.name, {**head, "runs": runs}, args.results)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--gguf", type=Path, help="SmolLM2's GGUF file, where it cannot be fetched")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--presets", nargs="+", default=list(BARS), choices=list(BARS))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="floor-cpu")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def _rows(model: Path, calibration: Path, samples: int) -> Tensor:
    encoder = load_text_encoder(model)
    return pack_rows(
        read_documents(str(calibration)).texts, encoder.encode_all, samples=samples, held_out=0, seq_len=SEQ_LEN,
        seed=0, start_tokens=encoder.start_tokens, source="calibration",
    ).calibration  # fmt: skip


def forward(decoder: nn.Module, rows: Tensor, device: torch.device) -> Spent:
    """What one pass of rows `[rows, tokens]` through the blocks takes; the head is left out."""
    step, clock = TOKENS_PER_BATCH[device.type] // SEQ_LEN, Clock()
    with torch.inference_mode():
        for start in range(0, len(rows), step):
            decoder(input_ids=rows[start : start + step].to(device), use_cache=False)
    return clock.spent(device)


def _quantize(
    model: Path, preset: str, calibration: Path, samples: int, device: torch.device
) -> tuple[Spent, dict[str, float]]:
    recipe = Recipe.preset(preset, group_size=GROUP_SIZE, samples=samples, seq_len=SEQ_LEN)
    with tempfile.TemporaryDirectory() as scratch:
        clock, out = Clock(), Path(scratch) / "out"
        quantize(model, out, recipe, calibration=calibration, options=RunOptions(device=str(device)))
        spent = clock.spent(device)
        return spent, json.loads((out / "awqkit-timings.json").read_text(encoding="utf-8"))["stages"]


def compared(preset: str, before: Spent, after: Spent, run: Spent) -> dict[str, Any]:
    """One entry of the JSON: the run as multiples of the faster pass, and whether the bar is kept in wall time."""
    wall, cpu = run.wall / min(before.wall, after.wall), run.cpu / min(before.cpu, after.cpu)
    return {
        "preset": preset, "forward": [asdict(before), asdict(after)], "quantize": asdict(run),
        "wall_multiple": wall, "cpu_multiple": cpu, "bar": BARS[preset], "kept": wall <= BARS[preset],
    }  # fmt: skip


def verdict(run: Mapping[str, Any]) -> str:
    """One line for people."""
    passes = " and ".join(f"{each['wall']:.1f}" for each in run["forward"])
    return (
        f"{run['preset']}: {run['quantize']['wall']:.1f} s, forward {passes} s: {run['wall_multiple']:.2f} × "
        f"({run['cpu_multiple']:.2f} × in CPU time), bar {run['bar']:.0f}: {'kept' if run['kept'] else 'not kept'}"
    )


if __name__ == "__main__":
    main()
