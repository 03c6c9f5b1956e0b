"""Seconds of a whole `quantize` run against one plain forward pass of the float32 blocks over the same tokens.

    python benchmarks/floor.py            128 rows of 512 tokens, on the CPU; about six minutes on two cores

Both in one process, forward pass first and last, model loading left out of it; `quantize` is timed with everything.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from bench import DATA, environment, save, text_files

from awqkit import Recipe, RunOptions, quantize
from awqkit.api.device import choose_device
from awqkit.api.smollm2 import smollm2
from awqkit.calibration.rows import pack_rows
from awqkit.calibration.sources import read_documents
from awqkit.checkpoint.reader import Checkpoint
from awqkit.evaluation.load import load_checkpoint
from awqkit.model.transformers_bridge import load_text_encoder

SEQ_LEN, TOKENS_PER_BATCH = 512, {"cpu": 4096, "cuda": 32768}


def main() -> None:
    """Time both and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="floor-cpu")
    args = parser.parse_args()
    calibration, device = text_files(args.data)["calibration"], choose_device(args.device)
    model = args.model or smollm2(emit=print)
    encoder = load_text_encoder(model)
    rows = pack_rows(
        read_documents(str(calibration)).texts, encoder.encode, samples=args.samples, held_out=0, seq_len=SEQ_LEN,
        seed=0, start_tokens=encoder.start_tokens, source="calibration",
    ).calibration  # fmt: skip
    decoder = load_checkpoint(Checkpoint.open(model), torch.float32, device).base_model
    step = TOKENS_PER_BATCH[device.type] // SEQ_LEN
    forward = [_forward(decoder, rows, step, device)]
    with tempfile.TemporaryDirectory() as scratch:
        recipe = Recipe.preset("fast", group_size=64, samples=args.samples, seq_len=SEQ_LEN)
        done = quantize(
            model, Path(scratch) / "out", recipe, calibration=calibration, options=RunOptions(device=args.device)
        )
        stages = _stages(Path(scratch) / "out" / "awqkit-timings.json")
    forward.append(_forward(decoder, rows, step, device))
    ratio = done.seconds / min(forward)
    print(
        f"forward {forward[0]:.1f} and {forward[1]:.1f} s, quantize {done.seconds:.1f} s: {ratio:.2f} times the faster"
    )
    save(
        args.name,
        {
            "environment": environment(device),
            "tokens": rows.numel(),
            "forward_seconds": forward,
            "quantize_seconds": done.seconds,
            "ratio_to_faster_forward": ratio,
            "stages": stages,
        },
    )


def _forward(decoder: torch.nn.Module, rows: torch.Tensor, step: int, device: torch.device) -> float:
    began = time.monotonic()
    with torch.inference_mode():
        for start in range(0, len(rows), step):
            decoder(input_ids=rows[start : start + step].to(device), use_cache=False)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - began


def _stages(path: Path) -> dict[str, float]:
    import json

    return json.loads(path.read_text(encoding="utf-8"))["stages"]


if __name__ == "__main__":
    main()
