"""Other quantizers beside ours: the same model, calibration tokens and grid, each in its own environment.

A peer is a script under `peers/`, run by the Python of an environment in which that tool is installed. It writes a
float32 checkpoint of the dequantized weights, which is evaluated like any full-precision model, so that no reader's
rounding stands between the tool and its figure. What is not installed is said in one line and left out.

    python benchmarks/peer_rows.py autoround=/envs/autoround/bin/python --model FOLDER --rows rows.json --out FOLDER
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent / "peers"
LIMIT_SECONDS = 3600.0


@dataclass(frozen=True)
class Peer:
    """A row of the table: the script that runs it, the method it is asked for, and the tool's name for the reader."""

    script: str
    method: str
    tool: str


PEERS = {
    "autoround": Peer("autoround.py", "signround", "AutoRound, 200 iterations"),
    "llmcompressor-gptq": Peer("llm_compressor.py", "gptq", "llm-compressor GPTQ"),
    "llmcompressor-awq": Peer("llm_compressor.py", "awq", "llm-compressor AWQ"),
    "llmcompressor-awq-gptq": Peer("llm_compressor.py", "awq-gptq", "llm-compressor AWQ then GPTQ"),
    "gptqmodel": Peer("gptqmodel_gptq.py", "gptq", "GPTQModel GPTQ"),
    "autoawq": Peer("autoawq.py", "awq", "AutoAWQ"),
}


@dataclass(frozen=True)
class PeerRun:
    """A finished peer. folder: its float32 checkpoint. seconds: loading and quantizing, without imports and writing."""

    folder: Path
    seconds: float
    peak_device_bytes: int | None
    versions: dict[str, str]
    notes: str


@dataclass(frozen=True)
class NotRun:
    """A peer without a figure, and the one line that says why."""

    reason: str


def run_peer(
    name: str,
    python: str,
    model: Path,
    rows: Sequence[Sequence[int]],
    bits: int,
    group_size: int,
    device: str,
    out: Path,
    limit_seconds: float = LIMIT_SECONDS,
) -> PeerRun | NotRun:
    """Quantize `model` with a peer on exactly `rows`, and say where its float32 checkpoint is.

    name: a key of PEERS. python: the interpreter that has the tool. rows: token ids, all of one length, used in this
    order. device: "cpu" or "cuda". out: a folder, made here, that gets rows.json, result.json, run.log and checkpoint/.
    An interpreter or a tool that is missing, a failure and a timeout are a NotRun, never an error.
    """
    if shutil.which(python) is None:
        return NotRun(f"{name}: not run, no interpreter {python}; pass --peer {name}=PYTHON")
    peer = PEERS[name]
    out.mkdir(parents=True, exist_ok=True)
    given, result, folder = out / "rows.json", out / "result.json", out / "checkpoint"
    result.unlink(missing_ok=True)
    given.write_text(json.dumps([list(row) for row in rows]), encoding="utf-8")
    command = [
        python, str(SCRIPTS / peer.script), "--model", str(model), "--rows", str(given), "--out", str(folder),
        "--bits", str(bits), "--group-size", str(group_size), "--method", peer.method, "--device", device,
        "--json", str(result),
    ]  # fmt: skip
    log = out / "run.log"
    with log.open("w", encoding="utf-8") as output:
        try:
            done = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=limit_seconds,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return NotRun(f"{name}: not finished after {limit_seconds:.0f} s, see {log}")
    if done.returncode != 0 or not result.is_file():
        return NotRun(f"{name}: not run, {_last_line(log)} (exit status {done.returncode}, see {log})")
    found = json.loads(result.read_text(encoding="utf-8"))
    return PeerRun(folder, found["seconds"], found["peak_device_bytes"], found["versions"], found["notes"])


def named_peers(words: Iterable[str]) -> dict[str, str]:
    """Row name -> interpreter, from `NAME=PYTHON` words. `llmcompressor=PYTHON` stands for its three rows.

    Raises ValueError for a word without `=` and for a name that is none of PEERS.
    """
    chosen: dict[str, str] = {}
    for word in words:
        name, equals, python = word.partition("=")
        rows = [name] if name in PEERS else [row for row in PEERS if row.startswith(f"{name}-")]
        if not equals or not python or not rows:
            raise ValueError(f"--peer {word}: expected NAME=PYTHON with NAME one of llmcompressor, {', '.join(PEERS)}")
        chosen |= dict.fromkeys(rows, python)
    return chosen


def not_asked(chosen: Iterable[str]) -> list[str]:
    """One line for every peer that nobody gave an interpreter for."""
    return [f"{name}: not run, no --peer {name}=PYTHON was given" for name in PEERS if name not in set(chosen)]


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def main() -> None:
    """Run the named peers on rows from a file, and print what each returned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="+", metavar="NAME=PYTHON")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True, help="JSON: a list of equally long lists of token ids")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    rows = json.loads(args.rows.read_text(encoding="utf-8"))
    for name, python in named_peers(args.peers).items():
        done = run_peer(name, python, args.model, rows, args.bits, args.group_size, args.device, args.out / name)
        print(done.reason if isinstance(done, NotRun) else f"{PEERS[name].tool}: {done}", flush=True)


if __name__ == "__main__":
    main()
