"""An estimate has a figure for every stage that the run will have, and leaves nothing on the disk."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from tiny_folders import make_model
from tiny_models import HANDING_ON, save_tiny, tiny_model, token_rows

from awqkit import Recipe, RunOptions, quantize
from awqkit.api.estimate import estimate
from awqkit.checkpoint.reports import TIMINGS_FILE
from awqkit.cli.main import main
from awqkit.errors import NoRoomError, UsageError
from awqkit.pipeline import block_cost
from awqkit.pipeline.block_step import BlockResult
from awqkit.pipeline.estimate import _overlap

CHOICES = {"group_size": 32, "bits": 3, "format": "compressed-tensors"}
RECIPES = {
    "rtn": Recipe.method("rtn", **CHOICES),
    "fast": Recipe.preset("fast", **CHOICES),
    "balanced": Recipe.preset("balanced", **CHOICES),
    "best": Recipe.preset("best", **CHOICES, tuning_epochs=1),
}
CPU = RunOptions(device="cpu")
ROWS = token_rows(18, 24)


@pytest.mark.parametrize("name", RECIPES)
def test_every_stage_of_the_run_is_in_it(name: str, tmp_path: Path) -> None:
    source, recipe = make_model(tmp_path / "source"), RECIPES[name]
    rows = ROWS if recipe.needs_calibration else None
    found = estimate(source, tmp_path / "out", recipe, calibration=rows, options=CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    quantize(source, tmp_path / "out", recipe, calibration=rows, options=CPU)
    stages = json.loads((tmp_path / "out" / TIMINGS_FILE).read_text(encoding="utf-8"))["stages"]
    expected = {stage for stage, seconds in stages.items() if seconds > 0} - {"save", "start", "copy", "generate"}
    assert expected <= found.seconds.keys()
    assert ("generate" in found.seconds) == (recipe.generated > 0)
    assert ("start" in found.seconds) == (recipe.sensitivity != "none")
    assert found.total_seconds == pytest.approx(sum(found.seconds.values()))
    assert found.host_bytes > 1e7
    assert found.device_bytes is None
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert 0.9 * written < found.out_bytes <= written
    assert found.to_json()["total_seconds"] == found.total_seconds


@pytest.mark.parametrize("family", HANDING_ON)
def test_blocks_that_hand_on_more_than_hidden_states(family: str, tmp_path: Path) -> None:
    save_tiny(tiny_model(family), tmp_path / "source")
    fast = Recipe.preset("fast", **CHOICES)
    assert estimate(tmp_path / "source", tmp_path / "out", fast, calibration=ROWS, options=CPU).total_seconds > 0
    best = Recipe.preset("best", **CHOICES, generated=0)
    with pytest.raises(UsageError, match="--estimate does not know this model: blocks hand on more"):
        estimate(tmp_path / "source", tmp_path / "out", best, calibration=ROWS, options=CPU)


def test_what_the_run_would_refuse_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tiny_model("llama"), tmp_path / "source")
    monkeypatch.setattr("awqkit.api.refuse.free_bytes", lambda device: 1.0)
    with pytest.raises(NoRoomError):
        estimate(tmp_path / "source", tmp_path / "out", RECIPES["fast"], calibration=ROWS, options=CPU)


def test_kernels_that_are_compiled_now_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, quantize_block = make_model(tmp_path / "source"), block_cost.quantize_block

    def first_block(compiling: float) -> float:
        """What is said of it where the first time takes half a second more, of which so much was the compiler's."""
        times = iter([0.5])

        def slow_at_first(*given: Any) -> BlockResult:
            result = quantize_block(*given)
            time.sleep(next(times, 0.0))
            return result

        told = nullcontext()
        told.seconds = compiling
        monkeypatch.setattr(block_cost, "CompileClock", lambda device: told)
        monkeypatch.setattr(block_cost, "quantize_block", slow_at_first)
        found = estimate(source, tmp_path / "out", RECIPES["fast"], calibration=ROWS, options=CPU)
        return found.seconds.get("first block", 0.0)

    assert first_block(compiling=0.0) > 0.4
    assert first_block(compiling=100.0) == 0.0


def test_a_block_that_took_long_is_not_run_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tiny_model("llama"), tmp_path / "source")
    monkeypatch.setattr(block_cost, "_LONG", 0.0)
    found = estimate(tmp_path / "source", tmp_path / "out", RECIPES["fast"], calibration=ROWS, options=CPU)
    assert "first block" not in found.seconds


def test_the_command_line_prints_it_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, page = make_model(tmp_path / "source"), tmp_path / "estimate.json"
    words = ["quantize", str(source), str(tmp_path / "out"), "--estimate", "--method", "rtn", "--group-size", "32"]
    assert main([*words, "--device", "cpu", "--json", str(page), "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "in all" in printed
    assert "Nothing was written." in printed
    assert json.loads(page.read_text(encoding="utf-8"))["measured_blocks"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"source", "estimate.json"}


def test_what_goes_on_beside_the_computation_takes_no_time_of_its_own() -> None:
    gpu = {"read": 40.0, "observe": 100.0, "write": 8.0}
    _overlap(gpu, 4, 12.0, beside_device=True)
    assert gpu == {"read": pytest.approx(10 + 6), "observe": 100.0, "write": pytest.approx(5.0)}
    slow_disk = {"read": 1.0, "observe": 10.0, "write": 2.0}
    _overlap(slow_disk, 4, 30.0, beside_device=False)
    assert slow_disk == {"read": 1.0, "observe": 10.0, "write": pytest.approx(2 + 20)}
