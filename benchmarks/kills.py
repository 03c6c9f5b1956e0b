"""Runs that are killed and begun again, beside a run that nobody disturbs: which files differ, byte by byte.

    python benchmarks/kills.py --device cuda --shapes smollm2 qwen3-moe --blocks 6 --vocab 1024

Of each shape and preset, text of the model's own and tuning among it: two whole runs, since two runs on one kind of
device are to write the same bytes, and one that is killed (SIGKILL) at random moments and goes on with the same command
until it is done. The report of seconds is left out, all other files are compared. Every block is made durable.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench import RESULTS, environment, save, write
from shapes import SHAPES, write_shape
from speed import PRESETS, Task

import awqkit.api.quantize  # noqa: F401 -- what a run imports is there when it begins
from awqkit import RunOptions, quantize

_LEFT_OUT = "awqkit-timings.json"


def main() -> None:
    """Every preset on every shape."""
    args = _arguments()
    if args.child is not None:
        _run(_task(args, args.child, args.presets[0]), args.child, args.out, args.device)
        return
    runs: list[dict[str, Any]] = []
    head = {"environment": environment(torch.device(args.device)), "blocks": args.blocks, "rows": args.rows}
    for shape in args.shapes:
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            folder = write_shape(shape, Path(scratch) / shape, blocks=args.blocks, vocab=args.vocab)
            for preset in args.presets:
                runs.append({"shape": shape, "preset": preset, **_killed(args, folder, preset)})
                print(runs[-1], flush=True)
                write(args.name, {**head, "runs": runs}, args.results)
    save(args.name, {**head, "runs": runs}, args.results)
    raise SystemExit(any(run["differ_again"] or run["differ_killed"] for run in runs))


def _killed(args: argparse.Namespace, folder: Path, preset: str) -> dict[str, Any]:
    """What differs, and where the run went on after each kill."""
    whole, again, out = (folder.with_name(f"{preset}-{name}") for name in ("whole", "again", "killed"))
    seconds = [_seconds(_start(args, folder, preset, place)) for place in (whole, again)]
    draw, went_on = random.Random(args.seed), list[int]()
    while len(went_on) < args.kills and not out.exists():
        process = _start(args, folder, preset, out)
        try:
            _seconds(process, draw.uniform(0.3, 0.9) * seconds[-1])
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            went_on.append(args.blocks if out.exists() else _blocks_kept(out))
    if not out.exists():
        _seconds(_start(args, folder, preset, out))
    return {
        "seconds": seconds,
        "kept_blocks": went_on,
        "differ_again": _differing(whole, again),
        "differ_killed": _differing(whole, out),
    }


def _start(args: argparse.Namespace, folder: Path, preset: str, out: Path) -> subprocess.Popen[bytes]:
    """A run in a process of its own, once its imports are done."""
    words = ["--child", folder, "--out", out, "--presets", preset, "--rows", args.rows, "--seq-len", args.seq_len]
    command = [sys.executable, __file__, *map(str, words), "--device", args.device]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def _seconds(process: subprocess.Popen[bytes], most: float | None = None) -> float:
    """Until the run is done. Raises TimeoutExpired after `most`, SystemExit where it failed by itself."""
    began = time.monotonic()
    if process.wait(most) != 0:
        raise SystemExit(f"a run ended with {process.returncode}")
    return time.monotonic() - began


def _blocks_kept(out: Path) -> int:
    """How many blocks a killed run that is not complete has on the disk."""
    journal = out.with_name(f".{out.name}.awqkit") / "journal.json"
    return int(json.loads(journal.read_text(encoding="utf-8"))["blocks"]) if journal.exists() else 0


def _differing(first: Path, second: Path) -> list[str]:
    """The names of files that are not the same in both."""
    names = {file.name for folder in (first, second) for file in folder.iterdir()} - {_LEFT_OUT}
    return sorted(name for name in names if _content(first / name) != _content(second / name))


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None


def _task(args: argparse.Namespace, folder: Path, preset: str) -> Task:
    return Task(folder, preset, args.rows, args.seq_len, whole_model=True, most=None)


def _run(task: Task, folder: Path, out: Path, device: str) -> None:
    ids = task.ids()
    print("begins", flush=True)
    quantize(folder, out, task.recipe, calibration=ids, options=RunOptions(device=device, save_every=0))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["smollm2"])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--vocab", type=int, help="instead of the shape's own vocabulary")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scratch", type=Path, help="where checkpoints go meanwhile")
    parser.add_argument("--name", default="kills")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
