"""With folds off nobody looks for them, and clip, rounding, refinement, propagation and tuning work as ever."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_contexts import run_on, written
from tiny_models import tiny_model

from awqkit import Recipe
from awqkit.errors import UsageError
from awqkit.model import folds

PRESETS = {name: Recipe.preset(name, group_size=32, generated=0.0) for name in ("fast", "balanced", "best")}


def _must_not(*arguments: Any) -> Any:
    raise AssertionError("asked where scales could be absorbed")


@pytest.mark.parametrize("preset", PRESETS)
def test_the_rest_is_as_without_channel_scales(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, recipe = tiny_model("llama"), replace(PRESETS[preset], tuning_epochs=0)
    plain = run_on(model, tmp_path, replace(recipe, channel_scale="none"), out="plain")
    monkeypatch.setattr(folds, "_producers", _must_not)
    off = run_on(model, tmp_path, replace(recipe, folds="off"), out="off")
    assert all(block.folds == () for block in off.report.blocks)
    found, expected = written(off.directory), written(plain.directory)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_tuning_moves_group_scales_alone(tmp_path: Path) -> None:
    model, recipe = tiny_model("llama"), replace(PRESETS["best"], folds="off")
    off = run_on(model, tmp_path, recipe, rows=12)
    assert off.report.tuning is not None and off.report.tuning.fallback is None
    norms = [name for name in written(off.directory) if name.endswith("norm.weight")]
    parameters = dict(model.named_parameters())
    assert norms and all(torch.equal(written(off.directory)[name].float(), parameters[name]) for name in norms)


def test_smoothquant_without_folds_is_refused() -> None:
    with pytest.raises(UsageError, match="folds is off, and smoothquant is nothing but"):
        Recipe.method("smoothquant", folds="off")


def test_where_scales_were_all_that_asked_for_text_none_is_read() -> None:
    assert Recipe(clip="none").needs_calibration
    assert not Recipe(clip="none", folds="off").needs_calibration
