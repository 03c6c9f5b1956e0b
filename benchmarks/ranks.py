"""One run on several ranks beside the same run on one: KL, the share of packed words that are equal, and seconds.

    python benchmarks/ranks.py --device cuda --ranks 1 2 --methods fast balanced

Ranks are started by torchrun on this machine, as a user would; each takes the next GPU, and where there are fewer GPUs
than ranks they share one, connected by gloo. What a run says of its ranks and their connection is kept with its row.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench import environment, save, text_files, write
from conditions import GROUP_SIZE, SEQ_LEN, add_arguments, open_conditions, score_folder, settings_of
from safetensors.torch import load_file

_PACKED = ("qweight", "weight_packed")


def main() -> None:
    """Every preset on each number of ranks, the first number being what the others are held against."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "ranks", ["fast", "balanced"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    args = parser.parse_args()
    conditions = open_conditions(args)
    original = conditions.reference(conditions.model)
    head = {"environment": environment(conditions.device), "model": conditions.model.name}
    head |= {"settings": settings_of(args), "gpus": torch.cuda.device_count()}
    runs: list[dict[str, Any]] = []
    for preset in args.methods:
        with tempfile.TemporaryDirectory() as scratch:
            first: dict[str, Any] = {}
            for count in args.ranks:
                out = Path(scratch) / f"ranks-{count}"
                row = {"method": preset, "ranks": count, **_run(args, conditions.model, preset, count, out)}
                if "failed" not in row:
                    row |= score_folder(conditions, out, original)
                    packed = _packed_words(out)
                    first = first or {"row": row, "packed": packed}
                    row["equal_words"] = _share_equal(first["packed"], packed)
                    row["kl_near_ratio"] = row["kl_near"] / first["row"]["kl_near"]
                    row["kl_far_ratio"] = row["kl_far"] / first["row"]["kl_far"]
                runs.append(row)
                print({key: value for key, value in row.items() if key != "said"}, flush=True)
                write(args.name, {**head, "runs": runs}, args.results)
    save(args.name, {**head, "runs": runs}, args.results)


def _run(args: argparse.Namespace, model: Path, preset: str, count: int, out: Path) -> dict[str, Any]:
    """Seconds of the command, and what it said of ranks."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count] if count > 1 else []
    words = [
        sys.executable,
        *start,
        "-m",
        "awqkit",
        "quantize",
        model,
        out,
        "--quality",
        preset,
        "--device",
        args.device,
    ]
    words += ["--group-size", GROUP_SIZE, "--samples", args.samples, "--seq-len", SEQ_LEN, "--seed", args.seeds[0]]
    words += ["--calibration", text_files(args.data, args.calibration)["calibration"]]
    began = time.monotonic()
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    seconds = time.monotonic() - began
    lines = (done.stdout + done.stderr).splitlines()
    if done.returncode:
        return {"failed": next((line for line in reversed(lines) if line.strip()), "no word"), "seconds": seconds}
    return {"seconds": seconds, "said": [line for line in lines if " ranks share " in line]}


def _packed_words(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= {name: words for name, words in load_file(path).items() if name.endswith(_PACKED)}
    return found


def _share_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    equal = sum(int((words == other[name]).sum()) for name, words in one.items())
    return equal / sum(words.numel() for words in one.values())


if __name__ == "__main__":
    main()
