"""Seconds of each stage of a block, tokens/s, share of the floor and peak memory of `quantize`, by shape and preset.

    python benchmarks/speed.py --shapes tiny --rows 16 --seq-len 32                      a trial on the CPU
    python benchmarks/speed.py --shapes llama-2-7b llama-3-8b --vocab 1024 --device cuda --name speed-h100
    python benchmarks/speed.py --shapes llama-2-7b --rows 32 128 512 --presets fast --device cuda --name speed-rows
    python benchmarks/speed.py --shapes llama-2-7b --presets balanced --device-memory 6 --device cuda   in 6 GB of it
    python benchmarks/speed.py --shapes llama-2-7b --ranks 1 2 --device cuda --name speed-ranks         by torchrun

Checkpoints have random weights (`shapes.py`), rows are random ids. Every run is a process of its own, so that its peak
is its own. A block's figures are medians over all blocks but the first. The floor of a block, measured in the process
after the run, holds what no implementation gets around: its bytes read and written once, the forward passes that the
recipe asks for, and H of every linear input. On several ranks the figures are those of the first. Text of the model's
own and tuning are left out unless asked for: they go over the whole model, not over a block.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench import RESULTS, environment, save, write
from shapes import SHAPES, write_shape

from awqkit import Recipe, RunOptions, quantize
from awqkit.api.device import choose_device
from awqkit.api.estimate import estimate
from awqkit.api.given_model import open_given
from awqkit.checkpoint.reports import TIMINGS_FILE
from awqkit.cli.allocator import grow_segments
from awqkit.cli.launched import follows
from awqkit.events import BlockFinished, Event, TaskAdvanced
from awqkit.kernels.precision import tensor_cores
from awqkit.model.block_calls import hand_on
from awqkit.numerics.statistics import Gram, accumulate_gram_, empty_statistics, whole_groups
from awqkit.pipeline.activations import HiddenStates, TokenRows
from awqkit.pipeline.plan import discover_block, make_probe

PRESETS = ("fast", "balanced", "best")
# Forward passes of a block. balanced: both streams. best: beside them one for the gradients at the end and one to begin
# again there, one for G, and for each of these two a pass back.
FORWARDS = {"fast": 1, "balanced": 2, "best": 7}
GRAMS = {"fast": 1, "balanced": 3, "best": 3}  # H; with propagation Ĥ and the cross term as well
_GROUP = 128  # of the presets, where it divides
_EXPERTS_MET = 8  # of a mixture, by each token


class BlockClock:
    """Seconds of each stage of each block, from the events of a run; the device has done its work at each mark."""

    def __init__(self, device: torch.device) -> None:
        self.blocks: list[dict[str, float]] = []
        self._device, self._stage, self._since = device, "", time.monotonic()
        self._now: dict[str, float] = defaultdict(float)

    def __call__(self, event: Event) -> None:
        if isinstance(event, TaskAdvanced) and event.name == "block" and event.detail:
            self._enter(event.detail)
        elif isinstance(event, BlockFinished):
            self._enter("")
            self.blocks.append(dict(self._now))
            self._now.clear()

    def _enter(self, stage: str) -> None:
        _synchronize(self._device)
        now = time.monotonic()
        if self._stage:
            self._now[self._stage] += now - self._since
        self._stage, self._since = stage, now


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class AnonymousPeak:
    """The most memory of a process that is no file's, looked at ten times a second; its files' pages are cache."""

    def __init__(self) -> None:
        self.bytes, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> AnonymousPeak:
        self._thread.start()
        return self

    def __exit__(self, *about: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            anonymous = next((line for line in lines if line.startswith("RssAnon")), "RssAnon: 0 kB")
            self.bytes = max(self.bytes, 1024 * int(anonymous.split()[1]))


@dataclass(frozen=True)
class Task:
    """A run to measure. whole_model: with own text and tuning. most: GB of the device that it may take."""

    folder: Path
    preset: str
    rows: int
    seq_len: int
    whole_model: bool
    most: float | None

    @property
    def recipe(self) -> Recipe:
        """The preset, on so many rows."""
        more: dict[str, Any] = {} if self.whole_model else {"generated": 0.0, "tuning_epochs": 0}
        return Recipe.preset(self.preset, samples=self.rows, seq_len=self.seq_len, **more)

    def ids(self) -> torch.Tensor:
        """Random rows, with an eighth more to hold out."""
        vocab = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        shape = (self.rows + max(1, self.rows // 8), self.seq_len)
        return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(0))

    def options(self, device: torch.device) -> RunOptions:
        """On which device."""
        return RunOptions(device=str(device), device_memory=self.most)


def estimated(task: Task, device: torch.device) -> dict[str, Any]:
    """What `--estimate` says of a run, and how long it takes to say so."""
    began = time.monotonic()
    found = estimate(
        task.folder, task.folder.parent / "out", task.recipe, calibration=task.ids(), options=task.options(device)
    )
    return {"estimating_seconds": time.monotonic() - began, **found.to_json()}


def one(task: Task, device: torch.device) -> dict[str, Any]:
    """One run, and the floor of one of its blocks."""
    folder, recipe, ids, options = task.folder, task.recipe, task.ids(), task.options(device)
    clock = BlockClock(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, AnonymousPeak() as anonymous:
        began, out = time.monotonic(), Path(scratch) / "out"
        quantize(folder, out, recipe, calibration=ids, options=options, emit=clock)
        _synchronize(device)
        seconds = time.monotonic() - began
        timings = json.loads((out / TIMINGS_FILE).read_text(encoding="utf-8"))["stages"]
        written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    later = clock.blocks[1:] or clock.blocks
    stages = {
        stage: statistics.median(block.get(stage, 0.0) for block in later)
        for stage in dict.fromkeys(stage for block in later for stage in block)
    }
    block_seconds = statistics.median(sum(block.values()) for block in later)
    lowest = floor(folder, task.preset, ids[: task.rows], device, written // len(clock.blocks))
    return {
        "blocks": len(clock.blocks), "seconds": seconds, "stages_of_run": timings, "block_stages": stages,
        "block_seconds": block_seconds, "tokens_per_second": task.rows * task.seq_len / block_seconds, "floor": lowest,
        "share_of_floor": sum(lowest.values()) / block_seconds, "device_peak": peak, "resident_peak": resident,
        "anonymous_peak": anonymous.bytes,
    }  # fmt: skip


def floor(folder: Path, preset: str, ids: torch.Tensor, device: torch.device, written: int) -> dict[str, float]:
    """Seconds that one block takes whatever is done: by part. written: bytes of a quantized block."""
    given = open_given(folder, folder.name, device, RunOptions(device=str(device)), needs_logits=False)
    skeleton, index = given.skeleton, given.skeleton.num_blocks - 1
    structure = discover_block(skeleton, make_probe(skeleton, device), index, device, look_for_folds=False)
    states = HiddenStates(skeleton, TokenRows(ids), device)
    read = _seconds(lambda: skeleton.load_block(index, device), device)
    block = skeleton.load_block(index, device)

    def forward() -> None:
        with torch.inference_mode():
            for _, hidden, call, _ in states.batches(index):
                hand_on(block, hidden, call)

    def grams() -> None:
        for entry in structure.inputs:
            share = 1.0 if entry.expert is None else min(1.0, _EXPERTS_MET / max(structure.experts))
            _gram(entry.num_channels, int(ids.numel() * share), device, _GROUP if preset == "fast" else None)

    with tensor_cores(device):
        passes, each = _seconds(forward, device), _seconds(grams, device)
    skeleton.release_block(index)
    with tempfile.NamedTemporaryFile(dir=folder.parent) as file:
        content = bytes(written)
        wrote = _seconds(lambda: (file.seek(0), file.write(content), file.flush()), torch.device("cpu"))
    return {"read": read, "forward": FORWARDS[preset] * passes, "grams": GRAMS[preset] * each, "write": wrote}


def _gram(channels: int, tokens: int, device: torch.device, group_size: int | None) -> None:
    """H of an input, or its blocks of a group each where a preset looks at no more."""
    empty = empty_statistics(channels, device, whole_groups(channels, group_size))
    gram = Gram(empty.weight_sum, empty.gram)
    inputs = torch.ones(min(4096, max(1, tokens)), channels, device=device)
    for _ in range(max(1, tokens // len(inputs))):
        gram = accumulate_gram_(gram, inputs)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The faster of two times."""
    found = []
    for _ in range(2):
        _synchronize(device)
        began = time.monotonic()
        work()
        _synchronize(device)
        found.append(time.monotonic() - began)
    return min(found)


def verdict(run: dict[str, Any]) -> str:
    """One line for people."""
    if "failed" in run:
        return f"{run['shape']} {run['preset']}: failed: {run['failed']}"
    peak = run["device_peak"] or run["anonymous_peak"]
    stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in run["block_stages"].items())
    ranks = f"{run['ranks']} ranks, " if "ranks" in run else ""
    return (
        f"{run['shape']} {run['preset']}, {ranks}{run['rows']} x {run['seq_len']} tokens, {run['blocks']} blocks: "
        f"{run['seconds']:.1f} s, {run['block_seconds']:.2f} s a block ({stages}), "
        f"{run['tokens_per_second']:.0f} tokens/s, {100 * run['share_of_floor']:.0f} % floor, "
        f"peak {peak / 1e9:.2f} GB{_beside_estimate(run)}"
    )


def _beside_estimate(run: dict[str, Any]) -> str:
    found = run.get("estimate", {})
    if "total_seconds" not in found:
        return f", no estimate: {found['failed']}" if found else ""
    return f", estimate {found['total_seconds']:.1f} s, {found['total_seconds'] / run['seconds']:.2f} of the run"


def _in_a_process(words: Sequence[object], ranks: int = 1) -> dict[str, Any]:
    """The JSON that this script's child prints, or the last line of what it had to say."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks] if ranks > 1 else []
    command = [sys.executable, *map(str, [*start, __file__, *words])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no word"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Every combination in a process of its own; the JSON is written after each."""
    grow_segments()  # as the command does; children inherit it
    args = _arguments()
    device = choose_device(args.device)
    if args.child:
        folder = args.child
        task = Task(folder, args.presets[0], args.rows[0], args.seq_len[0], args.whole_model, args.device_memory[0])
        if follows():  # another rank than the first, which measures
            quantize(folder, folder.parent / "none", task.recipe, calibration=task.ids(), options=task.options(device))
        else:
            print(json.dumps(estimated(task, device) if args.estimate else one(task, device)))
        return
    head, runs = {"environment": environment(device)}, list[dict[str, Any]]()
    for shape, blocks in itertools.product(args.shapes, args.blocks):
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            folder = write_shape(shape, Path(scratch) / f"{shape}-{blocks}", blocks=blocks, vocab=args.vocab)
            given = itertools.product(args.presets, args.rows, args.seq_len, args.device_memory, args.ranks)
            for preset, rows, seq_len, most, ranks in given:
                known = {"shape": shape, "preset": preset, "rows": rows, "seq_len": seq_len, "vocab": args.vocab}
                known |= {} if most is None else {"device_memory": most}
                known |= {} if ranks == 1 else {"ranks": ranks}
                words = ["--child", folder, "--presets", preset, "--rows", rows, "--seq-len", seq_len]
                words += [] if most is None else ["--device-memory", most]
                words += ["--device", device, *(["--whole-model"] if args.whole_model else [])]
                run = {**known, **_in_a_process(words, ranks)}
                if args.estimate and ranks == 1 and "failed" not in run:  # which estimates one process
                    run["estimate"] = _in_a_process([*words, "--estimate"])
                runs.append(run)
                print(verdict(run), flush=True)
                write(args.name, {**head, "runs": runs}, args.results)
    save(args.name, {**head, "runs": runs}, args.results)
    raise SystemExit(any("failed" in run for run in runs))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["llama-2-7b"])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--rows", nargs="+", type=int, default=[128])
    parser.add_argument("--seq-len", nargs="+", type=int, default=[512])
    parser.add_argument("--blocks", nargs="+", type=int, default=[3])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1], help="processes, started by torchrun")
    parser.add_argument("--vocab", type=int, help="instead of the shape's own vocabulary")
    parser.add_argument("--whole-model", action="store_true", help="with text of the model's own, and tuning")
    parser.add_argument("--estimate", action="store_true", help="hold what `quantize --estimate` says against each run")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--device-memory", nargs="+", type=float, default=[None], help="GB of a GPU at most")
    parser.add_argument("--scratch", type=Path, help="where checkpoints go meanwhile")
    parser.add_argument("--name", default="speed")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
