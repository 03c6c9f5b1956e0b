"""From measured rows to the table, the verdict on issue 13's bars, and who is ahead of whom.

A row has grid ("INT4 g64"), calibration, method, seed, seconds, and kl, perplexity and top1 for every text. Nothing is
measured here. Rows are compared with plain rounding of their own grid: RTN, or W8A8 without channel scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

TESTS = ("far", "near")
PLAIN = {"W8A8": "w8a8"}  # grid -> the method that is its yardstick, RTN where none is named
OURS = ("best", "balanced")
SEEDS_OF_A_BAR = 3

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Bar:
    """What a method has to reach: KL ÷ RTN's far and near at most, the share of RTN's perplexity gap near at least."""

    grid: str
    method: str
    far: float
    near: float
    gap_near: float


BARS = (
    Bar("INT4 g64", "best", 0.265, 0.158, 0.85),
    Bar("INT4 g64", "balanced", 0.285, 0.175, 0.84),
    Bar("INT3 g64", "best", 0.275, 0.165, 0.89),
    Bar("INT3 g64", "balanced", 0.295, 0.178, 0.88),
)


def summarize(rows: Sequence[Row], base: Mapping[str, float]) -> list[dict[str, Any]]:
    """Means over the seeds by grid, calibration and method, in order of first appearance. base: perplexity of the
    original by text.

    kl_ratio and gap_closed are there where the rows hold the grid's plain rounding, whatever it was calibrated on.
    """
    table = []
    for grid, calibration, method in dict.fromkeys((row["grid"], row["calibration"], row["method"]) for row in rows):
        own = _rows_of(rows, grid, method, calibration)
        plain = _rows_of(rows, grid, PLAIN.get(grid, "rtn"))
        line: dict[str, Any] = {
            "grid": grid, "calibration": calibration, "method": method, "tool": own[0].get("tool"),
            "seeds": sorted(row["seed"] for row in own), "seconds": round(mean(row["seconds"] for row in own), 2),
        }  # fmt: skip
        for name in TESTS:
            for figure in ("kl", "perplexity", "top1"):
                line[f"{figure}_{name}"] = mean(row[f"{figure}_{name}"] for row in own)
            if plain:
                kl, perplexity = (mean(row[f"{key}_{name}"] for row in plain) for key in ("kl", "perplexity"))
                line[f"kl_ratio_{name}"] = line[f"kl_{name}"] / kl
                line[f"gap_closed_{name}"] = (perplexity - line[f"perplexity_{name}"]) / (perplexity - base[name])
        table.append(line)
    return table


def _rows_of(rows: Sequence[Row], grid: str, method: str, calibration: str | None = None) -> list[Row]:
    return [
        row for row in rows
        if row["grid"] == grid and row["method"] == method and calibration in (None, row["calibration"])
    ]  # fmt: skip


def table_lines(table: Sequence[Row]) -> list[str]:
    """The table for people, a part for every grid and calibration text."""
    lines = []
    for grid, calibration in dict.fromkeys((line["grid"], line["calibration"]) for line in table):
        lines += [
            f"{grid}, calibration {calibration}: mean of seeds; KL ÷ plain rounding's, and share of its perplexity gap",
            f"{'':30} {'KL far':>8} {'÷':>6} {'KL near':>8} {'÷':>6} {'ppl far':>9} {'near':>9} "
            f"{'gap far':>8} {'near':>6} {'s':>7} seeds",
        ]
        for line in table:
            if (line["grid"], line["calibration"]) == (grid, calibration):
                lines.append(
                    f"  {line['tool'] or line['method']:28} {line['kl_far']:8.4f} {_share(line, 'kl_ratio_far', 6)} "
                    f"{line['kl_near']:8.4f} {_share(line, 'kl_ratio_near', 6)} {line['perplexity_far']:9.3f} "
                    f"{line['perplexity_near']:9.3f} {_share(line, 'gap_closed_far', 8, 100)} "
                    f"{_share(line, 'gap_closed_near', 6, 100)} {line['seconds']:7.1f} {len(line['seeds']):5}"
                )
    return lines


def _share(line: Row, key: str, width: int, percent: int = 1) -> str:
    if key not in line:
        return f"{'-':>{width}}"
    return f"{100 * line[key]:{width - 2}.1f} %" if percent == 100 else f"{line[key]:{width}.3f}"


def bar_results(table: Sequence[Row], calibration: str = "books") -> list[dict[str, Any]]:
    """Every bar whose row was measured: what was reached, and whether each figure keeps it."""
    results = []
    for bar in BARS:
        line = _line(table, bar.grid, calibration, bar.method)
        if line is None or "kl_ratio_far" not in line:
            continue
        found = {"far": line["kl_ratio_far"], "near": line["kl_ratio_near"], "gap_near": line["gap_closed_near"]}
        kept = {
            "far": found["far"] <= bar.far, "near": found["near"] <= bar.near,
            "gap_near": found["gap_near"] >= bar.gap_near,
        }  # fmt: skip
        bound = {"far": bar.far, "near": bar.near, "gap_near": bar.gap_near}
        results.append(
            {"grid": bar.grid, "method": bar.method, "seeds": len(line["seeds"]), "found": found, "bound": bound}
            | {"kept": kept, "all_kept": all(kept.values())}
        )
    return results


def bar_lines(results: Sequence[Row]) -> list[str]:
    """One line a bar, and one that says which bars no row was measured for."""
    lines = []
    for result in results:
        figures = ", ".join(_against_bound(result, key) for key in result["found"])
        seeds = "" if result["seeds"] >= SEEDS_OF_A_BAR else f"; {result['seeds']} of {SEEDS_OF_A_BAR} seeds"
        verdict = "kept" if result["all_kept"] else "not kept"
        lines.append(f"bar {result['grid']} {result['method']}: {figures}: {verdict}{seeds}")
    measured = {(result["grid"], result["method"]) for result in results}
    missing = [f"{bar.grid} {bar.method}" for bar in BARS if (bar.grid, bar.method) not in measured]
    return [*lines, f"bars without a row and its plain rounding: {', '.join(missing)}"] if missing else lines


def _against_bound(result: Row, key: str) -> str:
    found, bound, kept = (result[part][key] for part in ("found", "bound", "kept"))
    verdict = "kept" if kept else "not kept"
    if key == "gap_near":
        return f"gap near {100 * found:.1f} % (≥ {100 * bound:.0f} %, {verdict})"
    return f"{key} {found:.3f} (≤ {bound:.3f}, {verdict})"


def standing_lines(table: Sequence[Row], left_out: Sequence[str] = ()) -> list[str]:
    """For `best` and `balanced` of every grid and calibration text: which other rows are ahead of them, and in what.

    left_out: methods that are no competitors, such as variants of our own presets.
    """
    lines = []
    for grid, calibration in dict.fromkeys((line["grid"], line["calibration"]) for line in table):
        for method in OURS:
            ours = _line(table, grid, calibration, method)
            others = [
                line for line in table
                if (line["grid"], line["calibration"]) == (grid, calibration)
                and line["method"] not in (*OURS, *left_out)
            ]  # fmt: skip
            if ours is None or not others:
                continue
            behind = [each for line in others for each in _ahead(line, ours)]
            names = ", ".join(line["tool"] or line["method"] for line in others)
            where = f"{grid}, calibration {calibration}: {method}"
            verdict = f"is behind {'; '.join(behind)}" if behind else f"is ahead in KL and perplexity of {names}"
            lines.append(f"{where} {verdict}")
    return lines


def _ahead(other: Row, ours: Row) -> list[str]:
    """What the other row is at least as good in."""
    return [
        f"{other['tool'] or other['method']} in {figure} {name} ({other[key]:.4g} against {ours[key]:.4g})"
        for figure in ("kl", "perplexity")
        for name in TESTS
        if other[key := f"{figure}_{name}"] <= ours[key]
    ]


def _line(table: Sequence[Row], grid: str, calibration: str, method: str) -> Row | None:
    wanted = (grid, calibration, method)
    return next((line for line in table if (line["grid"], line["calibration"], line["method"]) == wanted), None)


def merged_rows(parts: Sequence[Sequence[Row]]) -> tuple[list[dict[str, Any]], int]:
    """The rows of several runs, one a grid, calibration, method and seed; and how many gave way to later ones."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    replaced = 0
    for part in parts:
        for row in part:
            key = (row["grid"], row["calibration"], row["method"], row["seed"])
            replaced += key in rows
            rows[key] = dict(row)
    return list(rows.values()), replaced
