"""The Recipe: presets, what a choice implies, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_contexts import GROUP, run_on, written
from tiny_models import tiny_model

from awqkit import Recipe, RunOptions, quantize
from awqkit.errors import UsageError
from awqkit.recipe import DEFAULT_QUALITY

RTN = Recipe.method("rtn")


@pytest.mark.parametrize(
    "changes",
    [
        {"channel_scale": "search"},
        {"clip": "ends"},
        {"rounding": "gptq"},
        {"refinement": ("descent",), "rounds": 1},
        {"propagation": 0.5},
        {"propagation": "auto"},
        {"sensitivity": "end-loss"},
    ],
)
def test_every_choice_that_looks_at_activations_needs_text(changes: dict) -> None:
    assert not RTN.needs_calibration
    assert replace(RTN, **changes).needs_calibration


def test_refinement_without_rounds_needs_no_text() -> None:
    assert not replace(RTN, refinement=("descent",)).needs_calibration
    assert not replace(RTN, rounds=3).needs_calibration


def test_refinement_after_nearest_rounding_is_carried_out(tmp_path: Path) -> None:
    model, rtn = tiny_model("llama"), replace(RTN, group_size=GROUP)
    refined = run_on(model, tmp_path, replace(rtn, refinement=("descent", "refit"), rounds=2), out="refined")
    plain = run_on(model, tmp_path, rtn, out="plain")
    tensors = [written(result.directory) for result in (plain, refined)]
    assert tensors[0].keys() == tensors[1].keys()
    assert any(bool((tensors[0][name] != tensors[1][name]).any()) for name in tensors[0] if "qweight" in name)
    linears = [linear for block in refined.report.blocks for linear in block.linears]
    assert all(linear.output_error <= linear.output_error_nearest for linear in linears)


def test_without_a_recipe_a_run_takes_the_default_preset(tmp_path: Path) -> None:
    source = (
        run_on(tiny_model("llama"), tmp_path, replace(RTN, group_size=GROUP), out="rtn").directory.parent / "source"
    )
    rows = [[1, *range(3, 26)] for _ in range(10)]
    result = quantize(source, tmp_path / "out", calibration=rows, options=RunOptions(device="cpu"))
    assert result.report.recipe == replace(Recipe.preset(DEFAULT_QUALITY), calibration="token rows given by the caller")


def test_a_recipe_made_field_by_field_does_not_call_itself_a_preset() -> None:
    assert Recipe(bits=3).name == "custom"
    assert Recipe.preset("best", bits=3).name == "best"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"refinement": ("descent", "polish")}, "refinement is"),
        ({"propagation": 1.5}, "propagation is 1.5; it takes a number from 0 to 1 or 'auto'"),
        ({"propagation": "always"}, "propagation is 'always'"),
        ({"damp_ratio": -0.1}, "damp_ratio is -0.1"),
        ({"smooth_alpha": 2}, "smooth_alpha is 2"),
        ({"rounds": True}, "rounds is True"),
        ({"bits": 9}, "bits is 9"),
        ({"group_size": 4}, "group_size is 4"),
        ({"scale_families": ()}, "scale_families is ()"),
        ({"importance": "loud"}, "importance is 'loud'"),
    ],
)
def test_values_out_of_range_are_refused_by_name(changes: dict, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        replace(RTN, channel_scale="search", **changes)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("quality", ["fast", "balanced", "best"])
def test_a_recipe_survives_its_own_dict(quality: str) -> None:
    recipe = Recipe.preset(quality, bits=3, group_size=64)
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in recipe.to_dict().items()}
    assert Recipe(**fields) == recipe
