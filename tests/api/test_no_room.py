"""Too little memory or disk, and a model that changes meanwhile: one line, and nothing left behind."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from tiny_contexts import block_context
from tiny_models import save_tiny, tiny_model, token_rows

import awqkit.pipeline.run as pipeline_run
from awqkit import Recipe, RunOptions, quantize
from awqkit.api import refuse
from awqkit.checkpoint import output
from awqkit.errors import CheckpointError, NoRoomError, OutputError
from awqkit.pipeline.block_memory import block_memory

BEST = Recipe.preset("best", group_size=32, generated=0, tuning_epochs=0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_tiny(tiny_model("llama"), tmp_path / "source")
    return tmp_path / "source"


def _run(source: Path, recipe: Recipe) -> None:
    rows = token_rows(18, 24) if recipe.needs_calibration else None
    quantize(source, source.parent / "out", recipe, calibration=rows, options=RunOptions(device="cpu"))


def _nothing_left(source: Path) -> bool:
    return [path.name for path in source.parent.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("method", "free", "line"),
    [
        ("rtn", 100_000.0, r"needs at least 0\.0 GB \(its weights in float32\), and cpu has 0\.0 GB free"),
        ("gptq", 250_000.0, r"\(weights and statistics in float32, one calibration row\), and cpu has 0\.0 GB free"),
    ],
)
def test_a_block_that_does_not_fit(
    method: str, free: float, line: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refuse, "free_bytes", lambda device: free)
    with pytest.raises(NoRoomError, match=line):
        _run(source, Recipe.method(method, group_size=32))
    assert _nothing_left(source)


@pytest.mark.parametrize("one_by_one", [True, False])
def test_a_mixture_is_not_refused_where_it_fits_expert_by_expert(
    one_by_one: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", model_type="mixtral", num_local_experts=8, num_experts_per_tok=2)
    recipe = Recipe.method("gptq", group_size=32)
    context = block_context(model, recipe=recipe)
    least = block_memory(context.skeleton, context.plan, recipe, 1).least(24)
    assert least < block_memory(context.skeleton, context.plan, recipe).least(24)
    monkeypatch.setattr(refuse, "free_bytes", lambda device: least + (1 if one_by_one else -1))
    source = save_tiny(model, tmp_path / "source")
    with nullcontext() if one_by_one else pytest.raises(NoRoomError, match="weights and statistics"):
        _run(source, recipe)


def test_temporary_files_that_do_not_fit(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    scratch = 2 * 16 * 24 * (3 * 64 + 3 * 64 + 96)  # bfloat16, 16 rows: three ends of blocks, the inputs of one
    states = 2 * 2 * 4 * 18 * 24 * 64
    enough = output.SPARE_BYTES + scratch + states
    free = [10 * enough, enough - 1]  # for the checkpoint, then for what is temporary

    def told(place: Any) -> Any:
        return usage(free.pop(0) if len(free) > 1 else free[0])

    monkeypatch.setattr(shutil, "disk_usage", told)
    with pytest.raises(OutputError, match=r"temporary files of the run \(TMPDIR\) need 0\.07 GB"):
        _run(source, BEST)
    assert _nothing_left(source)


def test_a_model_that_changes_while_it_is_read(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = pipeline_run.quantize_block

    def touched(*given: Any) -> Any:
        os.utime(source / "model.safetensors", ns=(1, 1))
        return step(*given)

    monkeypatch.setattr(pipeline_run, "quantize_block", touched)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: changed while the run read it"):
        _run(source, Recipe.method("rtn", group_size=32))
    assert _nothing_left(source)
