"""`awqkit inspect`: the tables people read, the JSON programs read, and one line where there is nothing to inspect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sample_report import FOLD_UNDONE, sample_report

from awqkit.api.inspect import inspect


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "done"
    folder.mkdir()
    (folder / "awqkit.json").write_text(json.dumps(sample_report()))
    return folder


def test_tables_by_fold_and_linear_and_what_fell_back(awqkit: Any, checkpoint: Path) -> None:
    outcome = awqkit("inspect", str(checkpoint))
    assert (outcome.code, outcome.err) == (0, "")
    lines = [" ".join(line.split()) for line in outcome.out.splitlines()]
    assert lines[0] == ("sample-135M: fast, 4 bits, groups of 64, asymmetric, format awq, 4.40 bits per weight")
    assert lines[1] == "42 linears in 6 blocks, 1 more kept in full precision; 19 of 24 folds in use"
    assert "fold in use mean min max std max/mean > 5x > 2x < 0.5x" in lines
    assert "input_layernorm 5/6 1.22 0.500 7.00 0.300 2.00 1.0 % 5.0 % 2.0 %" in lines
    assert "input_layernorm 20 5 duo 10, importance 5 0.300 0.500 0.500" in lines
    assert "mlp.down_proj 6 94.0 % 94.0 % 94.0 %" in lines
    assert "3 choices fell back:" in lines
    assert f"model.layers.2.post_attention_layernorm: {FOLD_UNDONE}" in lines


def test_json_is_the_inspection(awqkit: Any, checkpoint: Path) -> None:
    assert awqkit("inspect", str(checkpoint), "--json", "found.json").code == 0
    assert json.loads(Path("found.json").read_text()) == json.loads(json.dumps(inspect(checkpoint).to_json()))


def test_a_run_that_searched_nothing_says_so(awqkit: Any, checkpoint: Path) -> None:
    report = sample_report()
    report["recipe"] = {**report["recipe"], "name": "rtn", "channel_scale": "none", "clip": "none"}
    report["calibration"] = report["mean_output_errors"] = None
    for block in report["blocks"]:
        block["folds"], block["fallback"] = [], None
        for linear in block["linears"]:
            linear["fallback"] = None
    (checkpoint / "awqkit.json").write_text(json.dumps(report))
    text = awqkit("inspect", str(checkpoint)).out
    assert "No channel scales: this recipe searches none.\n" in text
    assert text.endswith("Nothing fell back.\n")
    assert "alpha" not in text


def test_a_checkpoint_that_kept_no_scales_says_what_to_do(awqkit: Any, checkpoint: Path) -> None:
    report = sample_report()
    for block in report["blocks"]:
        for fold in block["folds"]:
            del fold["scale"]
    (checkpoint / "awqkit.json").write_text(json.dumps(report))
    assert "did not keep its channel scales; quantize again to see them" in awqkit("inspect", str(checkpoint)).out


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (("no",), 1, "awqkit: error: no: no such folder; give a folder that `awqkit quantize` wrote"),
        ((".",), 1, "awqkit: error: .: has no awqkit.json, so awqkit did not quantize it; give a folder that "),
        ((".", "--json", "no/r.json"), 2, "awqkit inspect: error: --json no/r.json: there is no folder no; make it "),
        ((), 2, "awqkit inspect: error: the following arguments are required: DIR"),
    ],
)
def test_one_line_where_there_is_nothing_to_inspect(awqkit: Any, words: tuple[str, ...], code: int, line: str) -> None:
    outcome = awqkit("inspect", *words)
    assert outcome.code == code
    assert outcome.err.startswith(line)
    assert outcome.err.count("\n") == 1
    assert outcome.out == ""
