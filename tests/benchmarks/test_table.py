"""The quality table: means, ratios to the right yardstick, the bars, and who is ahead."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import quality
from table import BARS, bar_lines, bar_results, merged_rows, standing_lines, summarize, table_lines

BASE = {"far": 20.0, "near": 40.0}


def row(method: str, kl: float, perplexity: float, **other: Any) -> dict[str, Any]:
    """A row whose near KL is half the far one, and whose near perplexity is twice the far one."""
    figures = {"kl_far": kl, "kl_near": kl / 2, "perplexity_far": perplexity, "perplexity_near": 2 * perplexity}
    shared = {"grid": "INT4 g64", "calibration": "books", "seed": 0, "seconds": 1.0, "top1_far": 0.9, "top1_near": 0.9}
    return {"method": method, **shared, **figures, **other}


ROWS = [
    row("rtn", 0.4, 30.0),
    row("best", 0.10, 21.0, seconds=2.0),
    row("best", 0.12, 22.0, seed=1, seconds=4.0),
    row("rtn", 1.0, 60.0, grid="INT3 g64"),
    row("best", 0.2, 24.0, grid="INT3 g64"),
]


def test_a_line_is_the_mean_of_its_seeds_beside_the_plain_rounding_of_its_own_grid() -> None:
    lines = {(line["grid"], line["method"]): line for line in summarize(ROWS, BASE)}
    four, three = lines["INT4 g64", "best"], lines["INT3 g64", "best"]
    assert four["seeds"] == [0, 1]
    assert four["seconds"] == 3.0
    assert four["kl_ratio_far"] == pytest.approx(0.11 / 0.4)
    assert four["gap_closed_near"] == pytest.approx((60 - 43) / (60 - 40))
    assert three["kl_ratio_far"] == pytest.approx(0.2)
    assert lines["INT4 g64", "rtn"]["gap_closed_far"] == 0


def test_other_calibration_texts_share_the_plain_rounding_that_reads_none() -> None:
    table = summarize([*ROWS, row("best", 0.2, 25.0, calibration="second")], BASE)
    assert table[-1]["calibration"] == "second"
    assert table[-1]["kl_ratio_near"] == pytest.approx(0.5)


def test_8_bit_activations_are_compared_with_themselves_unscaled() -> None:
    rows = [*ROWS, row("w8a8", 0.02, 20.4, grid="W8A8"), row("smoothquant", 0.01, 20.1, grid="W8A8")]
    assert summarize(rows, BASE)[-1]["kl_ratio_far"] == pytest.approx(0.5)


def test_without_plain_rounding_there_are_figures_but_no_ratio() -> None:
    table = summarize([row("best", 0.1, 21.0)], BASE)
    assert "kl_ratio_far" not in table[0]
    assert bar_results(table) == []
    assert any(line.split()[:4] == ["best", "0.1000", "-", "0.0500"] for line in table_lines(table))


@pytest.mark.parametrize("bar", BARS, ids=lambda bar: f"{bar.grid} {bar.method}")
@pytest.mark.parametrize("missed", [None, "far", "near", "gap_near"])
def test_a_bar_is_kept_at_its_bound_and_not_beyond(bar: Any, missed: str | None) -> None:
    figures = {
        "kl_ratio_far": bar.far + (missed == "far") * 1e-3,
        "kl_ratio_near": bar.near + (missed == "near") * 1e-3,
        "gap_closed_near": bar.gap_near - (missed == "gap_near") * 1e-2,
    }
    line = {"grid": bar.grid, "calibration": "books", "method": bar.method, "seeds": [0, 1, 2], **figures}
    (result,) = bar_results([line])
    assert [key for key, kept in result["kept"].items() if not kept] == ([] if missed is None else [missed])
    first, last = bar_lines([result])
    assert first.endswith(": kept" if missed is None else ": not kept")
    assert last.startswith("bars without a row") and f"{bar.grid} {bar.method}" not in last


def test_a_mean_of_fewer_seeds_is_said_at_its_bar() -> None:
    lines = bar_lines(bar_results(summarize(ROWS, BASE)))
    assert lines[0].startswith("bar INT4 g64 best: far 0.275 (≤ 0.265, not kept), near 0.275")
    assert lines[0].endswith("2 of 3 seeds")


def test_a_row_that_is_ahead_of_ours_is_named_with_both_figures() -> None:
    peer = row("peer-autoround", 0.3, 21.0, tool="AutoRound")
    variant = row("best-no-clip", 0.01, 20.0)
    lines = standing_lines(summarize([*ROWS, peer, variant], BASE), ["best-no-clip"])
    assert lines == [
        "INT4 g64, calibration books: best is behind AutoRound in perplexity far (21 against 21.5); "
        "AutoRound in perplexity near (42 against 43)",
        "INT3 g64, calibration books: best is ahead in KL and perplexity of rtn",
    ]


def test_of_a_row_that_is_there_twice_the_later_one_stands() -> None:
    rows, replaced = merged_rows([ROWS, [row("best", 0.5, 29.0, seed=1), row("best", 0.1, 21.0, seed=2)]])
    assert replaced == 1
    assert len(rows) == len(ROWS) + 1
    assert [each["kl_far"] for each in rows if each["method"] == "best"][:3] == [0.1, 0.5, 0.2]


def saved(path: Path, rows: list[dict[str, Any]], **settings: Any) -> Path:
    original = settings.pop("original", BASE)
    not_run = settings.pop("not_run", [])
    result = {
        "environment": {},
        "model": "m",
        "not_run": not_run,
        "settings": {"samples": 128, "windows": 60, **settings},
    }
    path.write_text(json.dumps({**result, "original": original, "rows": rows}))
    return path


def test_runs_are_merged_into_one_table_with_their_sources(tmp_path: Path) -> None:
    peer = row("peer-autoround", 0.3, 21.0, tool="AutoRound")
    failed = [
        "INT4 g64 seed 0 gptqmodel: not run, no interpreter x",
        "autoawq: not run, no --peer autoawq=PYTHON was given",
    ]
    files = [saved(tmp_path / "a.json", ROWS[:2], not_run=failed), saved(tmp_path / "b.json", [*ROWS[2:], peer])]
    quality.merge(files).finish(argparse.Namespace(name="all", results=tmp_path))
    result = json.loads((tmp_path / "all.json").read_text())
    assert [part["file"] for part in result["parts"]] == ["a.json", "b.json"]
    assert result["table"] == summarize([*ROWS, peer], BASE)
    assert [line.split(":")[0] for line in result["not_run"]] == [
        "INT4 g64 seed 0 gptqmodel", "llmcompressor-gptq", "llmcompressor-awq", "llmcompressor-awq-gptq", "autoawq",
    ]  # fmt: skip


def test_a_merge_can_be_merged_again_and_a_failure_goes_where_another_run_has_the_row(tmp_path: Path) -> None:
    failed = ["INT4 g64 seed 0 autoround: not run, out of memory"]
    files = [saved(tmp_path / "a.json", ROWS[:2], not_run=failed), saved(tmp_path / "b.json", ROWS[2:])]
    quality.merge(files).finish(argparse.Namespace(name="all", results=tmp_path))
    assert failed[0] in json.loads((tmp_path / "all.json").read_text())["not_run"]
    peer = saved(tmp_path / "c.json", [row("peer-autoround", 0.3, 21.0, tool="AutoRound")])
    quality.merge([tmp_path / "all.json", peer]).finish(argparse.Namespace(name="all", results=tmp_path))
    result = json.loads((tmp_path / "all.json").read_text())
    assert [part["file"] for part in result["parts"]] == ["a.json", "b.json", "c.json"]
    assert failed[0] not in result["not_run"]


@pytest.mark.parametrize("change", [{"samples": 16}, {"windows": 4}, {"original": {"far": 20.1, "near": 40.0}}])
def test_runs_of_other_conditions_are_not_merged(tmp_path: Path, change: dict[str, Any]) -> None:
    files = [saved(tmp_path / "a.json", ROWS), saved(tmp_path / "b.json", ROWS, **change)]
    with pytest.raises(SystemExit, match=r"b\.json"):
        quality.merge(files)
