"""Every GPU figure of this folder again: the commands below, spread over the GPUs, several at once on each.

    python benchmarks/again.py --gpus 2 --each 3 --results DIR          all of them
    python benchmarks/again.py --gpus 1 --only twins bars-int4          some
    python benchmarks/again.py --list

A run keeps a GPU busy for a third of the time, so three share one well where CUDA's multi-process service
(`nvidia-cuda-mps-control -d`) is on; the seconds in their JSON are then those of a shared GPU. What the time does not
suffice for (`--seconds`) is stopped or not begun, and named at the end; the JSON of a run that was stopped has the
rows so far. Logs lie beside the results.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench import DATA, RESULTS

SCRIPTS = Path(__file__).resolve().parent
ONE_SEED = "quality.py --seeds 0 --methods rtn"
PARTS = "scales clip gptq gptq-moment-order descent refit propagation sensitivity tuning"
LEFT_OUT = "no-scales no-clip no-d nearest moment-order no-descent no-refit no-refinement text-only no-tuning"
CHANGED = (
    "propagation-0 propagation-auto propagation-0.25 propagation-0.75 propagation-1.0 mean-damping sensitivity "
    "own-text-once"
)

# name of the JSON -> command; the longest first
COMMANDS = {
    "bars-int4": "quality.py --bits 4",
    "bars-int3": "quality.py --bits 3",
    "twins": "twins.py",
    "ablation-best": f"{ONE_SEED} best best-no-sensitivity best-no-tuning best-text-only",
    "ablation-rounds": f"{ONE_SEED} best-rounds-1 best-rounds-4",
    "ablation-rows": f"{ONE_SEED} best-rows-64-at-once best-rows-384-at-once best-rows-in-place",
    "ablation-left-out": " ".join([ONE_SEED, "balanced", *(f"balanced-{part}" for part in LEFT_OUT.split())]),
    "ablation-changed": " ".join([ONE_SEED, "balanced", *(f"balanced-{part}" for part in CHANGED.split())]),
    "ablation-added": f"{ONE_SEED} balanced-tuning balanced-generated-0.25 balanced-generated-0.5",
    "ablation-alone": " ".join([ONE_SEED, *(f"only-{part}" for part in PARTS.split()), "fast-d fast-generated"]),
    "calibration-second": "quality.py --seeds 0 --calibration second",
    "calibration-builtin": "quality.py --seeds 0 --calibration builtin",
    "w8a8": "quality.py --methods w8a8 smoothquant",
}


@dataclass
class Running:
    """A command under way."""

    name: str
    process: subprocess.Popen[bytes]
    gpu: int


def main() -> None:
    """Start commands as places become free, until all are done or the time is over."""
    args = _arguments()
    waiting = [name for name in COMMANDS if not args.only or name in args.only]
    if args.list:
        print("\n".join(f"{name:22} {COMMANDS[name]}" for name in waiting))
        return
    args.results.mkdir(parents=True, exist_ok=True)
    began, running, failed = time.monotonic(), list[Running](), list[str]()
    free = [gpu for _ in range(args.each) for gpu in range(args.gpus)]
    while (waiting or running) and time.monotonic() - began < args.seconds:
        while free and waiting:
            running.append(_start(waiting.pop(0), free.pop(0), args))
        for each in [each for each in running if each.process.poll() is not None]:
            running.remove(each)
            free.append(each.gpu)
            failed += [each.name] if each.process.returncode else []
            print(f"{time.monotonic() - began:5.0f} s  {each.name}: exit status {each.process.returncode}", flush=True)
        time.sleep(0.5)
    for each in running:
        each.process.kill()
    for what, names in (("failed", failed), ("stopped", [each.name for each in running]), ("not begun", waiting)):
        if names:
            print(f"{what}: {' '.join(names)}")
    if failed or running or waiting:
        raise SystemExit(1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--each", type=int, default=1, help="runs at once on each GPU")
    parser.add_argument("--only", nargs="+", choices=list(COMMANDS), metavar="NAME", help="see --list")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--model", type=Path, help="SmolLM2's folder (default: fetched once)")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def _start(name: str, gpu: int, args: argparse.Namespace) -> Running:
    script, *words = shlex.split(COMMANDS[name])
    where = ["--device", "cuda", "--data", str(args.data), "--results", str(args.results), "--name", f"{name}-gpu"]
    where += ["--model", str(args.model)] if args.model else []
    threads = max(1, (os.cpu_count() or 1) // (args.gpus * args.each))
    environment = {"CUDA_VISIBLE_DEVICES": str(gpu), "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    with (args.results / f"{name}-gpu.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPTS / script), *words, *where], stdout=log, stderr=subprocess.STDOUT,
            env=os.environ | environment,
        )  # fmt: skip
    return Running(name, process, gpu)


if __name__ == "__main__":
    main()
