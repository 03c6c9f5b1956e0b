"""A run that stops on its way, for whatever reason, says why in one line and removes what it had written."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_folders import Place, change_tensors

import awqkit.pipeline.run as pipeline_run
from awqkit.checkpoint.writer import CheckpointWriter

STARTED = ("calibration: ", "groups of ", "caution: ", "block ")  # lines of a run under way


def poison(place: Place, tensor: str, value: float) -> None:
    """Put one bad value into a tensor of the model."""
    change_tensors(place.model, lambda tensors: tensors[tensor].reshape(-1)[3:4].fill_(value))


@pytest.fixture
def sibling(monkeypatch) -> list[Path]:
    """The temporary folders that writers made: the tests below must not pass because nothing was written."""
    folders: list[Path] = []
    enter = CheckpointWriter.__enter__

    def remembered(writer: CheckpointWriter) -> CheckpointWriter:
        entered = enter(writer)
        assert entered.folder.is_dir()
        folders.append(entered.folder)
        return entered

    monkeypatch.setattr(CheckpointWriter, "__enter__", remembered)
    return folders


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "tensor",
    ["model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"],
)
def test_nan_and_inf_are_found_when_their_part_is_read(refused, place, sibling, tensor, value):
    poison(place, tensor, value)
    line = refused(after=STARTED)
    assert line == (
        f"tensor {tensor} holds NaN or inf, so the checkpoint is damaged: fetch or convert it again; "
        "nothing was kept of this run"
    )
    assert len(sibling) == 1


def test_nan_is_found_without_calibration_too(refused, place, sibling):
    poison(place, "model.norm.weight", float("nan"))
    assert "tensor model.norm.weight holds NaN or inf" in refused("--method", "rtn", after=STARTED)
    assert len(sibling) == 1


def in_second_block(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], None]) -> None:
    """Let `happens` come in the way of the second block's step."""
    step = pipeline_run.quantize_block

    def patched(context: Any, *rest: Any) -> Any:
        if context.index == 1:
            happens()
        return step(context, *rest)

    monkeypatch.setattr(pipeline_run, "quantize_block", patched)


def test_ctrl_c(quantize, place, sibling, monkeypatch):
    def interrupt() -> None:
        raise KeyboardInterrupt

    in_second_block(monkeypatch, interrupt)
    before = place.contents()
    outcome = quantize()
    assert outcome.code == 130
    assert outcome.err.splitlines()[-1] == "awqkit: interrupted, nothing was left behind"
    assert "Traceback" not in outcome.err
    assert place.contents() == before
    assert len(sibling) == 1


def test_a_disk_that_fills_up_on_the_way(quantize, place, sibling, monkeypatch):
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere/model.safetensors")

    in_second_block(monkeypatch, full)
    before = place.contents()
    outcome = quantize()
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1] == (
        "awqkit: error: disk full while writing somewhere/model.safetensors: "
        "nothing was left behind, free some space and run again"
    )
    assert place.contents() == before
    assert len(sibling) == 1


def test_a_disk_without_room_for_the_shards(refused, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    assert refused(after=STARTED).endswith("out: disk full; free some space and run again")


def test_a_failed_overwrite_leaves_the_old_checkpoint(quantize, refused, place):
    assert quantize("--method", "rtn").code == 0
    poison(place, "model.layers.1.mlp.up_proj.weight", float("nan"))
    assert "holds NaN or inf" in refused("--method", "rtn", "--overwrite", after=STARTED)
