"""KL and perplexity of packed and loaded checkpoints on SmolLM2-135M, several calibration seeds, as ratios to RTN.

    python benchmarks/quality.py --device cuda --bits 4 3       full size: 128 rows, 60 windows, seeds 0 1 2
    python benchmarks/quality.py --samples 16 --windows 16 --seeds 0 --methods rtn fast      a size for two CPU cores
    python benchmarks/quality.py --device cuda --seeds 0 --ablation               each part alone, and left out
    python benchmarks/quality.py --device cuda --calibration builtin              or second: books_second.txt
    python benchmarks/quality.py --device cuda --methods w8a8 smoothquant         8-bit weights and activations
    python benchmarks/quality.py --device cuda --methods rtn --seeds 0 --peer autoround=PYTHON llmcompressor=PYTHON
    python benchmarks/quality.py --merge a.json b.json --name quality             one table from several runs

Each row of the table is `awqkit.quantize` to a folder, then an evaluation of that folder against the original, both in
float32. far: WikiText-2 test, near: books like the calibration text. Peers write float32 folders from the same rows.
The JSON is written after every row, so a run that is stopped keeps what it has.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ablation import ABLATION, REPLACED, replaced
from bench import environment, save, write
from conditions import (
    GROUP_SIZE,
    SEEDLESS,
    W8A8,
    Conditions,
    add_arguments,
    calibration_rows,
    grid_of,
    measure,
    open_conditions,
    recipe_of,
    score_folder,
    settings_of,
    without_held_out,
)
from peer_rows import PEERS, NotRun, named_peers, not_asked, run_peer
from table import bar_lines, bar_results, merged_rows, standing_lines, summarize, table_lines
from torch import nn

from awqkit import Recipe
from awqkit.errors import AwqkitError

METHODS_BY_DEFAULT = ["rtn", "gptq", "autoawq", "awq", "fast", "balanced", "best"]
PEER = "peer-"  # before the name of a peer's row: our method `autoawq` is its recipe, the peer is the tool itself
SAME_ORIGINAL = 1e-3  # relative difference of the original's perplexity between two runs that may be merged
SHARED_SETTINGS = ("samples", "windows")  # what merged runs must have in common


@dataclass
class Table:
    """The result as it grows; `keep` writes what there is of it."""

    head: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)

    def result(self) -> dict[str, Any]:
        """Everything that the JSON holds."""
        table = summarize(self.rows, self.head["original"])
        return {**self.head, "not_run": self.not_run, "table": table, "bars": bar_results(table), "rows": self.rows}

    def add(self, row: dict[str, Any], args: argparse.Namespace) -> None:
        """Say a row, and write all rows so far."""
        self.rows.append(row)
        print(row, flush=True)
        write(args.name, self.result(), args.results)

    def leave_out(self, reason: str) -> None:
        """Say why a row is not there."""
        self.not_run.append(reason)
        print(reason, flush=True)

    def finish(self, args: argparse.Namespace) -> None:
        """Print the table and the verdicts, and write the JSON."""
        result = self.result()
        verdicts = [*bar_lines(result["bars"]), *standing_lines(result["table"], list(ABLATION))]
        print("\n".join([*table_lines(result["table"]), *verdicts]))
        save(args.name, result, args.results)


def main() -> None:
    """Run the table, or merge several, and write its JSON."""
    args, peers = _arguments()
    if args.merge:
        merge(args.merge).finish(args)
        return
    conditions = open_conditions(args)
    original = conditions.reference(conditions.model)
    base = {name: found.perplexity for name, found in conditions.score(original).items()}
    print(f"original: perplexity far {base['far']:.3f}, near {base['near']:.3f}", flush=True)
    settings = settings_of(args) | {"peer": list(peers)}
    head = {"environment": environment(conditions.device), "model": conditions.model.name}
    table = Table({**head, "settings": settings, "original": base})
    _measure_ours(args, conditions, original, table)
    _measure_peers(args, peers, conditions, original, table)
    for line in not_asked(peers):
        table.leave_out(line)
    table.finish(args)


def _arguments() -> tuple[argparse.Namespace, dict[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "quality", METHODS_BY_DEFAULT)
    parser.set_defaults(methods=None)
    parser.add_argument("--bits", nargs="+", type=int, default=[4], choices=[2, 3, 4, 8])
    parser.add_argument("--ablation", action="store_true", help="the rows of ablation.py, with rtn, balanced and best")
    parser.add_argument("--peer", nargs="+", default=[], metavar="NAME=PYTHON", help="see peer_rows.py")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="JSON", help="results of this script; nothing is run")
    args = parser.parse_args()
    if args.methods is None:
        args.methods = ["rtn", "balanced", "best", *ABLATION] if args.ablation else METHODS_BY_DEFAULT
    try:
        return args, named_peers(args.peer)
    except ValueError as error:
        parser.error(str(error))


def _measure_ours(args: argparse.Namespace, conditions: Conditions, original: nn.Module, table: Table) -> None:
    found: dict[tuple[Recipe, str], dict[str, Any]] = {}
    for bits in args.bits:
        for method in args.methods:
            if method in W8A8 and bits != args.bits[0]:
                continue
            for seed in args.seeds[:1] if method in SEEDLESS else args.seeds:
                grid = grid_of(method, bits)
                try:
                    recipe = replace(recipe_of(method, seed, args, bits), name="row")
                    changes = REPLACED.get(method, {})
                    variant = (recipe, repr(changes))
                    if variant not in found:
                        with replaced(changes):
                            found[variant] = measure(conditions, recipe, seed, reference=original)
                except AwqkitError as error:
                    table.leave_out(f"{grid} {method}: not run, {error}")
                    break
                named = {"grid": grid, "calibration": args.calibration, "method": method, "seed": seed}
                table.add({**named, **found[variant]}, args)


def _measure_peers(
    args: argparse.Namespace, peers: dict[str, str], conditions: Conditions, original: nn.Module, table: Table
) -> None:
    """Every peer on the rows that our methods learn from; seed by seed, so that all have the first seed soon."""
    for bits in args.bits:
        for seed in args.seeds:
            rows = without_held_out(calibration_rows(conditions.calibration, args.samples, seed))
            for name, python in peers.items():
                with conditions.scratch() as scratch:
                    where = (bits, GROUP_SIZE, conditions.device.type, Path(scratch))
                    done = run_peer(name, python, conditions.model.resolve(), rows, *where)
                    if isinstance(done, NotRun):
                        table.leave_out(_peer_row(grid_of(name, bits), seed, done.reason))
                        continue
                    figures = score_folder(conditions, done.folder, original)
                named = {"grid": grid_of(name, bits), "calibration": args.calibration, "method": PEER + name}
                named |= {"seed": seed, "tool": PEERS[name].tool, "versions": done.versions, "notes": done.notes}
                spent = {"seconds": done.seconds, "peak_device_bytes": done.peak_device_bytes}
                table.add({**named, **spent, **figures}, args)


def _peer_row(grid: str, seed: int, name_or_reason: str) -> str:
    """How a peer's row is named where it could not be measured; a NotRun's reason begins with the peer's name."""
    return f"{grid} seed {seed} {name_or_reason}"


def merge(files: list[Path]) -> Table:
    """One table from the results of several runs, or merges; of a row that is there twice the later file's stands.

    Ends the program where two runs are not of the same model, samples, windows and original.
    """
    parts = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    first = parts[0]
    sources = [_sources(file, part) for file, part in zip(files, parts, strict=True)]
    expected = sources[0][0]["settings"]
    for file, part, runs in zip(files, parts, sources, strict=True):
        for name in SHARED_SETTINGS:
            if runs[0]["settings"][name] != expected[name]:
                raise SystemExit(f"{file.name}: {name} {runs[0]['settings'][name]}, but {expected[name]} before")
        differs = any(
            abs(part["original"][text] / value - 1) > SAME_ORIGINAL for text, value in first["original"].items()
        )
        if part["model"] != first["model"] or differs:
            raise SystemExit(f"{file.name}: another original than in {files[0].name}")
    rows, replaced = merged_rows([part["rows"] for part in parts])
    if replaced:
        print(f"{replaced} rows were in more than one file: the later file's stand")
    runs = [run for each in sources for run in each]
    table = Table({"parts": runs, "model": first["model"], "original": first["original"]}, rows)
    table.not_run = _missing_peers(parts, rows)
    return table


def _sources(file: Path, part: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that a result holds: itself, or those that were merged into it."""
    if "parts" in part:
        return part["parts"]
    return [{"file": file.name, "environment": part["environment"], "settings": part["settings"]}]


def _missing_peers(parts: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[str]:
    """Why each peer without a row has none: what happened to it in some run, else that nobody asked for it.

    A failure stays out where another run has the row.
    """
    unasked = set(not_asked(()))
    measured = tuple(f"{_peer_row(row['grid'], row['seed'], row['method'].removeprefix(PEER))}:" for row in rows)
    lines = [line for part in parts for line in part["not_run"] if line not in unasked]
    reasons = [line for line in lines if not line.startswith(measured)]
    found = {row["method"].removeprefix(PEER) for row in rows if row["method"].startswith(PEER)}
    found |= {name for name in PEERS if any(f" {name}:" in line for line in reasons)}
    return [*dict.fromkeys(reasons), *not_asked(found)]


if __name__ == "__main__":
    main()
