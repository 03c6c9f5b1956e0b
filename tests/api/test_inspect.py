"""`inspect` on a report built by hand, whose numbers can be worked out, and on what is no checkpoint of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sample_report import LINEARS, NUM_BLOCKS, sample_report

from awqkit import inspect
from awqkit.errors import CheckpointError


def folder_with(content: Any, directory: Path) -> Path:
    (directory / "awqkit.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


@pytest.fixture
def found(tmp_path: Path) -> Any:
    return inspect(folder_with(sample_report(), tmp_path))


def test_scales_are_summed_up_over_the_folds_in_use(found: Any) -> None:
    rows = {row.fold: row for row in found.scales}
    assert list(rows) == ["input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj"]
    norm = rows["input_layernorm"]  # block 4 went back as a whole
    assert (norm.found, norm.in_use, norm.channels) == (6, 5, 5 * 64)
    assert norm.mean == pytest.approx(1.0 + (0 + 1 + 2 + 3 + 5) / 5 / 10)
    assert (norm.min, norm.max) == (0.5, 7.0)
    assert (norm.share_above_5x, norm.share_above_2x, norm.share_below_half) == pytest.approx((0.01, 0.05, 0.02))
    assert sum(norm.log2_counts) == 5 * 64
    assert norm.consumers == LINEARS[:3]
    assert rows["post_attention_layernorm"].in_use == 4  # and block 2's was undone


def test_a_mean_over_folds_counts_channels(tmp_path: Path) -> None:
    report = sample_report()
    report["blocks"] = report["blocks"][:2]
    report["blocks"][1]["folds"][0]["num_channels"] = 3 * 64
    row = inspect(folder_with(report, tmp_path)).scales[0]
    assert row.mean == pytest.approx((1.0 + 3 * 1.1) / 4)


def test_alpha_and_clip(found: Any) -> None:
    alpha = found.alphas[0]
    assert (alpha.units, alpha.identity) == (20, 5)
    assert alpha.families == {"duo": 10, "importance": 5}
    assert (alpha.min, alpha.median, alpha.max) == (0.3, 0.5, 0.5)
    assert (alpha.counts[6], alpha.counts[10], sum(alpha.counts)) == (5, 10, 15)
    assert [row.linear for row in found.clips] == list(LINEARS)
    assert found.clips[0].mean == pytest.approx(0.94)
    assert sum(found.clips[0].counts) == NUM_BLOCKS * 100


def test_what_fell_back_and_what_it_is(found: Any) -> None:
    assert [fallback.where for fallback in found.fallbacks] == [
        "model.layers.1.self_attn.o_proj", "model.layers.2.post_attention_layernorm", "model.layers.4",
    ]  # fmt: skip
    assert (found.model, found.group_size, found.recipe["bits"]) == ("sample-135M", 64, 4)
    assert (found.linears, found.kept, found.folds, found.folds_in_use) == (42, 1, 24, 19)
    assert found.bits_per_weight == pytest.approx(4.4)


def test_the_same_as_json(found: Any) -> None:
    again = json.loads(json.dumps(found.to_json()))
    assert again["scales"][0]["max"] == 7.0
    assert again["fallbacks"][2]["where"] == "model.layers.4"


def test_a_checkpoint_without_distributions_has_no_scale_rows(tmp_path: Path) -> None:
    report = sample_report()
    for block in report["blocks"]:
        for fold in block["folds"]:
            del fold["scale"]
    found = inspect(folder_with(report, tmp_path))
    assert found.scales == ()
    assert len(found.alphas) == 4


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{", "is not JSON"),
        ("[]", "has no schema, this awqkit reads schema 1"),
        ('{"schema": 0}', "has schema 0, this awqkit reads schema 1"),
        ('{"schema": 99}', "has schema 99, this awqkit reads schema 1"),
        ('{"schema": 1}', "is damaged (KeyError: 'blocks'); quantize again"),
        ({**sample_report(), "blocks": [{"folds": 3}]}, "is damaged (TypeError: "),
    ],
)
def test_a_report_that_cannot_be_read(tmp_path: Path, content: Any, line: str) -> None:
    with pytest.raises(CheckpointError) as error:
        inspect(folder_with(content, tmp_path))
    assert str(error.value).startswith(f"{tmp_path / 'awqkit.json'}: {line}")
    assert "\n" not in str(error.value)


def test_folders_that_are_no_checkpoint_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, line in (
        (tmp_path / "no", "no such folder; give a folder that `awqkit quantize` wrote"),
        (tmp_path, "has no awqkit.json, so awqkit did not quantize it"),
        (tmp_path / "file", "is a file; give a folder"),
    ):
        with pytest.raises(CheckpointError) as error:
            inspect(place)
        assert str(error.value).startswith(f"{place}: {line}")


def test_inspecting_imports_no_torch(tmp_path: Path) -> None:
    folder_with(sample_report(), tmp_path)
    code = "import sys, awqkit; awqkit.inspect(sys.argv[1]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
