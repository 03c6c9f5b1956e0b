"""Whole processes side by side: `awqkit quantize` and other quantizers on one machine, one after the other.

    python benchmarks/beside_peers.py --device cuda --peer autoround=PYTHON llmcompressor-gptq=PYTHON
    python benchmarks/beside_peers.py --device cpu --samples 32 --blocks 6 --peer autoround=PYTHON   the first 6 blocks

Seconds are those of the process, from its start to its end, imports and writing among them; `--repeats` runs ours
several times, since the first one in a new environment compiles kernels. Bytecode is compiled beforehand for all, as
pip leaves it: it is kept in a folder of the benchmark's own, where a first start of each puts it. `start_seconds` is
what a process takes to import torch and the model's class and to wake the device. Ours is the command that a user
types, given the text, of which it chooses rows itself, run by the Python that runs this; a peer gets token rows of the
same text. All are scored from their folders on the same windows, so that a time stands beside what it bought. Of a
model cut to its first blocks, KL is to the cut one. `--estimate` has the command say beforehand how long it will take,
which is held against what it counts itself, without the imports before it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import environment, save, text_files, write
from conditions import (
    GROUP_SIZE,
    SEQ_LEN,
    Conditions,
    add_arguments,
    calibration_rows,
    open_conditions,
    score_folder,
    settings_of,
    without_held_out,
)
from memory import first_blocks
from peer_rows import LIMIT_SECONDS, PEERS, SCRIPTS, NotRun, named_peers, not_asked, run_peer
from torch import nn

PRESETS = ("fast", "balanced")
_START = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
with torch.device("meta"):
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]))
torch.zeros(1, device=sys.argv[2])
"""


def main() -> None:
    """Ours first, then the peers; the JSON is written after each."""
    args, peers = _arguments()
    with tempfile.TemporaryDirectory() as scratch:
        if args.blocks:
            whole, args.model = open_conditions(args).model, Path(scratch) / "cut"
            first_blocks(whole, args.model, args.blocks)
        os.environ["PYTHONPYCACHEPREFIX"] = str(Path(scratch) / "bytecode")
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        for name, python in peers.items():
            subprocess.run([python, str(SCRIPTS / PEERS[name].script), "--help"], capture_output=True, check=False)
        conditions = open_conditions(args)
        original = conditions.reference(conditions.model)
        head = {"environment": environment(conditions.device), "model": conditions.model.name}
        head |= {"settings": settings_of(args) | {"peer": list(peers)}, "start_seconds": start_seconds(conditions)}
        runs: list[dict[str, Any]] = []
        for preset in args.methods:
            for repeat in range(args.repeats):
                row = ours(args, conditions, preset, Path(scratch) / "ours", original if repeat == 0 else None)
                _add(runs, {"method": preset, "repeat": repeat, **row}, head, args)
        for name, python in peers.items():
            _add(runs, {"method": name, **_peer(args, conditions, name, python, original)}, head, args)
    for line in not_asked(peers):
        print(line)
    save(args.name, {**head, "runs": runs, "not_run": not_asked(peers)}, args.results)


def _arguments() -> tuple[argparse.Namespace, dict[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "beside-peers", list(PRESETS))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--blocks", type=int, help="cut the model to its first blocks, where the peers take too long")
    parser.add_argument("--repeats", type=int, default=2, help="of ours")
    parser.add_argument("--estimate", action="store_true", help="of ours, before each first run")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds after which a peer is given up")
    parser.add_argument("--peer", nargs="+", default=[], metavar="NAME=PYTHON", help="see peer_rows.py")
    args = parser.parse_args()
    try:
        return args, named_peers(args.peer)
    except ValueError as error:
        parser.error(str(error))


def start_seconds(conditions: Conditions) -> float:
    """Of the second of two processes that do no more than start; a copy of what every one of the runs has in it."""
    for _ in range(2):
        began = time.monotonic()
        words = [sys.executable, "-c", _START, str(conditions.model), conditions.device.type]
        subprocess.run(words, check=True, capture_output=True)
    return time.monotonic() - began


def ours(
    args: argparse.Namespace, conditions: Conditions, preset: str, out: Path, original: nn.Module | None
) -> dict[str, Any]:
    """One run of the command, with its stages and, where there is an original to compare with, its figures."""
    shutil.rmtree(out, ignore_errors=True)
    text = text_files(args.data, args.calibration)["calibration"]
    words = [sys.executable, "-m", "awqkit", "quantize", conditions.model, out, "--quality", preset]
    words += ["--bits", args.bits, "--group-size", GROUP_SIZE, "--samples", args.samples, "--seq-len", SEQ_LEN]
    words += ["--calibration", text, "--seed", args.seeds[0], "--device", conditions.device.type, "--quiet"]
    words, row = [*map(str, words)], dict[str, Any]()
    if args.estimate and original is not None:
        told = out.with_suffix(".json")
        subprocess.run([*words, "--estimate", "--json", str(told)], check=True, stdout=subprocess.DEVNULL)
        row["estimated_seconds"] = json.loads(told.read_text(encoding="utf-8"))["total_seconds"]
    began = time.monotonic()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    row["seconds"] = time.monotonic() - began
    timings = json.loads((out / "awqkit-timings.json").read_text(encoding="utf-8"))
    figures = {} if original is None else score_folder(conditions, out, original)
    return {**row, "own_seconds": timings["seconds"], "stages": timings["stages"], **figures}


def _peer(
    args: argparse.Namespace, conditions: Conditions, name: str, python: str, original: nn.Module
) -> dict[str, Any]:
    """A peer's process, with what it counts itself: loading and quantizing, without imports and writing."""
    rows = without_held_out(calibration_rows(conditions.calibration, args.samples, args.seeds[0]))
    with conditions.scratch() as scratch:
        where = (args.bits, GROUP_SIZE, conditions.device.type, Path(scratch), args.limit)
        began = time.monotonic()
        done = run_peer(name, python, conditions.model.resolve(), rows, *where)
        seconds = time.monotonic() - began
        if isinstance(done, NotRun):
            return {"failed": done.reason}
        figures = score_folder(conditions, done.folder, original)
    return {
        "seconds": seconds, "own_seconds": done.seconds, "tool": PEERS[name].tool, "versions": done.versions,
        "notes": done.notes, **figures,
    }  # fmt: skip


def _add(runs: list[dict[str, Any]], row: dict[str, Any], head: dict[str, Any], args: argparse.Namespace) -> None:
    runs.append(row)
    said = row.get("failed") or f"{row['seconds']:.1f} s, own {row['own_seconds']:.1f}" + "".join(
        f", KL {text} {row[f'kl_{text}']:.4f}" for text in ("far", "near") if f"kl_{text}" in row
    )
    if "estimated_seconds" in row:
        said += f", estimated {row['estimated_seconds']:.1f}"
    print(f"{row['method']}: {said}", flush=True)
    write(args.name, {**head, "runs": runs}, args.results)


if __name__ == "__main__":
    main()
