"""The rows of the quality table: recipes, calibration rows, the kept logits of the original, the floor's multiples."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench
import conditions
import floor
import kept_logits
import pytest
import quality
import torch
from ablation import ABLATION, REPLACED, replaced
from conditions import METHODS, Conditions, calibration_rows, grid_of, measure, recipe_of, without_held_out
from floor import Spent, compared, verdict
from kept_logits import KeptLogits, reference_of
from peer_rows import NotRun, PeerRun
from tiny_models import save_tiny, tiny_model, token_rows

from awqkit import Recipe
from awqkit.api.evaluate import score

CPU = torch.device("cpu")
ARGS = argparse.Namespace(samples=8, seeds=[0, 1], bits=[4, 3], methods=["rtn", "fast", "w8a8"], calibration="books")


@pytest.fixture
def tiny(tmp_path: Path) -> Conditions:
    model = save_tiny(tiny_model("llama", intermediate_size=128), tmp_path / "model")
    windows = {name: torch.tensor(token_rows(3, 24, seed)) for seed, name in enumerate(("far", "near"))}
    return Conditions(model, CPU, windows, torch.tensor(token_rows(12, 24, 7)), 1)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_recipe_of_the_grid_that_the_table_says(method: str, bits: int) -> None:
    recipe = recipe_of(method, 5, ARGS, bits)
    assert (recipe.samples, recipe.seed) == (8, 5)
    if grid_of(method, bits) == "W8A8":
        assert (recipe.bits, recipe.activations, recipe.symmetric) == (8, "int8", True)
    else:
        assert grid_of(method, bits) == f"INT{recipe.bits} g{recipe.group_size}"
        assert recipe.format == ("awq" if bits == 4 else "compressed-tensors")


def test_every_variant_of_a_preset_changes_it_except_what_is_its_default_already() -> None:
    presets = {name: replace(recipe_of(name, 0, ARGS), name="") for name in ("balanced", "best")}
    same = {
        name
        for name in ABLATION
        for preset, recipe in presets.items()
        if name.startswith(preset) and replace(recipe_of(name, 0, ARGS), name="") == recipe
    }
    defaults = {f"balanced-propagation-{presets['balanced'].propagation}"}
    assert same - set(REPLACED) <= defaults | {f"{name}-propagation-auto" for name in presets}


def test_what_no_recipe_chooses_is_replaced_while_a_row_is_measured_and_put_back() -> None:
    from awqkit.methods import rows

    usual = rows.ROWS_AT_ONCE
    for name, values in REPLACED.items():
        assert name in ABLATION
        with replaced(values):
            assert all(getattr(rows, dotted.rpartition(".")[2]) == value for dotted, value in values.items())
    assert usual == rows.ROWS_AT_ONCE
    with pytest.raises(AttributeError), replaced({"awqkit.methods.rows.NO_SUCH": 1}):
        pass


def test_peers_get_the_rows_that_our_methods_learn_from() -> None:
    windows = torch.arange(40).reshape(20, 2)
    rows = calibration_rows(windows, 16, 3)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    assert len(rows) == 18
    assert without_held_out(rows) == windows[order[:16]].tolist()


def test_kept_logits_give_the_figures_of_the_model_itself(tiny: Conditions) -> None:
    original, other = tiny.load(tiny.model), tiny_model("llama", seed=1, intermediate_size=128)
    kept = reference_of(original, tiny.windows, CPU)
    assert isinstance(kept, KeptLogits)
    for windows in (*tiny.windows.values(), tiny.windows["near"][[2, 0]]):  # in another order too
        assert score(kept, windows, 1, None, CPU) == score(original, windows, 1, None, CPU)
        ours, expected = (score(other, windows, 1, reference, CPU) for reference in (kept, original))
        assert ours.kl is not None and ours.kl > 0.01
        assert ours.kl == pytest.approx(expected.kl, rel=1e-5)


def test_kept_logits_answer_for_nothing_else(tiny: Conditions) -> None:
    kept = reference_of(tiny.load(tiny.model), tiny.windows, CPU)
    with pytest.raises(KeyError):
        kept(torch.tensor(token_rows(1, 24, seed=9)))


def test_logits_that_do_not_fit_are_not_kept(tiny: Conditions, monkeypatch: pytest.MonkeyPatch) -> None:
    model, needed = tiny.load(tiny.model), 4 * 6 * 24 * 192
    monkeypatch.setattr(kept_logits, "free_bytes", lambda device: needed)  # all of it, and only a share may be used
    assert reference_of(model, tiny.windows, CPU) is model


def test_a_row_is_measured_from_the_written_folder(tiny: Conditions) -> None:
    args = argparse.Namespace(samples=8)
    reference = tiny.reference(tiny.model)
    rows = {bits: measure(tiny, recipe_of("rtn", 0, args, bits), 0, reference=reference) for bits in (3, 4)}
    assert rows[3]["kl_far"] > rows[4]["kl_far"] > 0
    assert rows[4]["perplexity_near"] > 0
    assert not list(tiny.model.parent.glob("out"))


def test_rows_are_kept_as_they_come_and_the_same_recipe_is_measured_once(
    tiny: Conditions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Recipe] = []

    def fake(conditions: Conditions, recipe: Recipe, seed: int, **named: Any) -> dict[str, Any]:
        measured.append(recipe)
        if len(measured) == 5:
            raise KeyboardInterrupt
        figures = {f"{key}_{text}": 1.0 for key in ("kl", "perplexity", "top1") for text in ("far", "near")}
        return {"seconds": 1.0, **figures}

    monkeypatch.setattr(quality, "measure", fake)
    monkeypatch.setitem(conditions.METHODS, "again", conditions.METHODS["rtn"])
    chosen = {**vars(ARGS), "methods": ["rtn", "again", "w8a8", "fast"], "name": "stopped", "results": tmp_path}
    table = quality.Table({"original": {"far": 0.5, "near": 0.5}})
    with pytest.raises(KeyboardInterrupt):
        quality._measure_ours(argparse.Namespace(**chosen), tiny, torch.nn.Module(), table)
    saved = json.loads((tmp_path / "stopped.json").read_text())
    found = [(row["grid"], row["method"], row["seed"]) for row in saved["rows"]]
    assert found == [
        ("INT4 g64", "rtn", 0), ("INT4 g64", "again", 0), ("INT4 g64", "again", 1), ("W8A8", "w8a8", 0),
        ("INT4 g64", "fast", 0),
    ]  # fmt: skip
    assert len(measured) == 5


def test_a_peer_is_scored_from_its_folder_and_one_that_failed_is_said(
    tiny: Conditions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(name: str, python: str, model: Path, rows: Any, *where: Any) -> PeerRun | NotRun:
        assert rows == without_held_out(calibration_rows(tiny.calibration, 8, 0))
        assert where[:3] == (4, 64, "cpu")
        run = PeerRun(shutil.copytree(model, where[3] / "checkpoint"), 2.5, None, {"tool": "1"}, "as it is")
        return NotRun(f"{name}: no tool") if name == "autoawq" else run

    monkeypatch.setattr(quality, "run_peer", fake)
    args = argparse.Namespace(**{**vars(ARGS), "bits": [4], "seeds": [0], "name": "peers", "results": tmp_path})
    table = quality.Table({"original": {"far": 0.5, "near": 0.5}})
    peers = {"autoawq": "python", "autoround": "python"}
    quality._measure_peers(args, peers, tiny, tiny.reference(tiny.model), table)
    assert table.not_run == ["INT4 g64 seed 0 autoawq: no tool"]
    (row,) = json.loads((tmp_path / "peers.json").read_text())["rows"]
    assert (row["method"], row["tool"], row["seconds"]) == ("peer-autoround", "AutoRound, 200 iterations", 2.5)
    assert row["kl_far"] == pytest.approx(0, abs=1e-6)


def test_a_result_does_not_say_where_an_interpreter_lies() -> None:
    assert bench._without_way("autoround=/home/me/envs/bin/python") == "autoround=…"
    assert bench._without_way("/home/me/model") == "model"


def test_multiples_are_of_the_faster_pass_and_the_bar_is_on_wall_time() -> None:
    run = compared("fast", Spent(2.0, 4.0), Spent(3.0, 3.5), Spent(6.1, 7.0))
    assert (run["wall_multiple"], run["cpu_multiple"], run["kept"]) == (pytest.approx(3.05), 2.0, False)
    assert verdict(run).endswith("bar 3: not kept")
    assert compared("fast", Spent(2.0, 4.0), Spent(3.0, 3.5), Spent(6.0, 7.0))["kept"]
    assert set(floor.BARS) == {"fast", "balanced", "best"}
