"""A run that was stopped goes on where it was, and writes what an unbroken one writes, byte for byte."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_models import HANDING_ON, save_tiny, tiny_model, token_rows

import awqkit.pipeline.run as pipeline_run
from awqkit import Recipe, RunOptions, quantize
from awqkit.checkpoint import run_state
from awqkit.checkpoint.run_state import KEPT_ATTRIBUTE
from awqkit.errors import CheckpointError, OutputError
from awqkit.events import Caution, Notice
from awqkit.pipeline import tuning_stage

BLOCKS = 4
ROWS = token_rows(18, 24)
CHOICES = {"group_size": 32, "bits": 3, "format": "compressed-tensors"}
EVERY_BLOCK = RunOptions(device="cpu", save_every=0)
RECIPES = {
    "rtn": Recipe.method("rtn", **CHOICES),
    "fast": Recipe.preset("fast", **CHOICES),
    "balanced": Recipe.preset("balanced", **CHOICES, generated=0.2),
    "best": Recipe.preset("best", **CHOICES, generated=0.2, tuning_epochs=1),
}


class _Stopped(Exception):
    """Stands for whatever may end a run."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_tiny(tiny_model("llama", num_hidden_layers=BLOCKS), tmp_path / "source")
    return tmp_path / "source"


def _run(
    source: Path, out: Path, recipe: Recipe, options: RunOptions = EVERY_BLOCK, rows: Any = ROWS, **more: Any
) -> Any:
    return quantize(
        source, out, recipe, calibration=rows if recipe.needs_calibration else None, options=options, **more
    )


def _contents(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir() if file.name != "awqkit-timings.json"}


def _stop_before(block: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] = _Stopped) -> None:
    step = pipeline_run.quantize_block

    def stopping(context: Any, *rest: Any) -> Any:
        if context.index == block:
            raise error("stopped")
        return step(context, *rest)

    monkeypatch.setattr(pipeline_run, "quantize_block", stopping)


def _kept(out: Path) -> Path:
    return out.with_name(f".{out.name}.awqkit")


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("block", [1, 3])
def test_a_stopped_run_goes_on_and_writes_the_same_bytes(
    name: str, block: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(source, tmp_path / "whole", RECIPES[name], RunOptions(device="cpu"))
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        _stop_before(block, patch)
        with pytest.raises(_Stopped) as caught:
            _run(source, out, RECIPES[name])
    assert f"{block} of {BLOCKS} blocks are done; the same command goes on" in getattr(caught.value, KEPT_ATTRIBUTE)
    assert not out.exists()
    quantized = []
    step = pipeline_run.quantize_block

    def counted(context: Any, *rest: Any) -> Any:
        quantized.append(context.index)
        return step(context, *rest)

    monkeypatch.setattr(pipeline_run, "quantize_block", counted)
    events: list[object] = []
    _run(source, out, RECIPES[name], emit=events.append)
    assert quantized == list(range(block, BLOCKS))
    assert any(isinstance(each, Notice) and f"going on after block {block} of {BLOCKS}" in each.text for each in events)
    assert not any(isinstance(each, Caution) and "goes on elsewhere" in each.text for each in events)
    assert _contents(out) == _contents(tmp_path / "whole")
    assert not _kept(out).exists()


@pytest.mark.parametrize("family", HANDING_ON)
def test_what_blocks_hand_on_is_durable_too(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tiny_model(family), tmp_path / "source")
    recipe, out = Recipe.preset("balanced", **CHOICES, generated=0), tmp_path / "out"
    _run(tmp_path / "source", tmp_path / "whole", recipe)
    with monkeypatch.context() as patch:
        _stop_before(2, patch)
        with pytest.raises(_Stopped):
            _run(tmp_path / "source", out, recipe)
    _run(tmp_path / "source", out, recipe)
    assert _contents(out) == _contents(tmp_path / "whole")


def test_a_run_that_stops_while_it_writes_what_was_tuned_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RECIPES["balanced"]
    _run(source, tmp_path / "whole", recipe)
    out = tmp_path / "out"
    rewrite = pipeline_run._rewrite
    with monkeypatch.context() as patch:

        def half(job: Any, index: int, *rest: Any) -> None:
            if index == 2:
                raise _Stopped("stopped")
            rewrite(job, index, *rest)

        patch.setattr(pipeline_run, "_rewrite", half)
        with pytest.raises(_Stopped):
            _run(source, out, recipe)
    _run(source, out, recipe)
    assert _contents(out) == _contents(tmp_path / "whole")


@pytest.mark.parametrize("begins_with_room", [True, False])
def test_whether_scales_are_tuned_is_settled_once(
    begins_with_room: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def room(is_there: bool) -> None:
        monkeypatch.setattr(tuning_stage, "free_bytes", lambda device: 1e12 if is_there else 1.0)

    recipe, out = RECIPES["balanced"], tmp_path / "out"
    room(begins_with_room)
    _run(source, tmp_path / "whole", recipe)
    _stopped(source, out, monkeypatch, "balanced")
    room(not begins_with_room)
    _run(source, out, recipe)
    assert _contents(out) == _contents(tmp_path / "whole")


def test_what_has_nothing_durable_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stop_before(2, monkeypatch)
    with pytest.raises(_Stopped) as caught:
        _run(source, tmp_path / "out", RECIPES["fast"], RunOptions(device="cpu", save_every=3600))
    assert not hasattr(caught.value, KEPT_ATTRIBUTE)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_damaged_model_keeps_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stop_before(2, monkeypatch, CheckpointError)
    with pytest.raises(CheckpointError):
        _run(source, tmp_path / "out", RECIPES["fast"])
    assert not _kept(tmp_path / "out").exists()


def _stopped(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, name: str = "fast") -> None:
    with monkeypatch.context() as patch:
        _stop_before(2, patch)
        with pytest.raises(_Stopped):
            _run(source, out, RECIPES[name])


def test_changed_inputs_and_options_are_named_and_restart_begins_anew(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    _stopped(source, out, monkeypatch)
    with pytest.raises(OutputError, match=r"seed was 0, is 1; .*--restart"):
        _run(source, out, Recipe.preset("fast", **CHOICES, seed=1))
    with pytest.raises(OutputError, match="calibration text has changed"):
        _run(source, out, RECIPES["fast"], rows=token_rows(18, 24, seed=5))
    weights = source / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    with pytest.raises(OutputError, match=r"model\.safetensors was"):
        _run(source, out, RECIPES["fast"])
    assert _kept(out).exists()
    _run(source, out, Recipe.preset("fast", **CHOICES, seed=1), RunOptions(device="cpu", save_every=0, restart=True))
    _run(source, tmp_path / "whole", Recipe.preset("fast", **CHOICES, seed=1))
    assert _contents(out) == _contents(tmp_path / "whole")


def test_what_changed_on_the_disk_is_noticed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    _stopped(source, out, monkeypatch)
    weights = _kept(out) / "checkpoint" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    first, _ = header["model.layers.0.input_layernorm.weight"]["data_offsets"]
    content[start + first] ^= 1
    weights.write_bytes(content)
    with pytest.raises(OutputError, match=r"model.layers.0.input_layernorm.weight of the stopped run .* has changed"):
        _run(source, out, RECIPES["fast"])
    (_kept(out) / "journal.json").write_text("{", encoding="utf-8")
    with pytest.raises(OutputError, match=r"damaged .*journal.json cannot be read.*--restart"):
        _run(source, out, RECIPES["fast"])


def test_a_kept_run_without_its_checkpoint_is_told(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    _stopped(source, out, monkeypatch)
    shutil.rmtree(_kept(out) / "checkpoint")
    with pytest.raises(OutputError, match=r"of the stopped run that is kept, cannot be read .*--restart"):
        _run(source, out, RECIPES["fast"])


def test_two_runs_cannot_write_to_one_place(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    step = pipeline_run.quantize_block

    def second(context: Any, *rest: Any) -> Any:
        if context.index == 1:
            with pytest.raises(OutputError, match=rf"another run is writing there \(process {os.getpid()} on "):
                _run(source, out, RECIPES["rtn"], RunOptions(device="cpu", restart=True))
        return step(context, *rest)

    monkeypatch.setattr(pipeline_run, "quantize_block", second)
    _run(source, out, RECIPES["rtn"])
    assert out.is_dir()
    assert not _kept(out).exists()


def test_what_a_run_left_that_was_killed_after_its_last_step_is_thrown_away(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(run_state.shutil, "rmtree", lambda *given, **choices: None)
        _run(source, out, RECIPES["fast"])
    assert (_kept(out) / "journal.json").exists()
    with pytest.raises(OutputError, match="exists; give another name, or --overwrite"):
        _run(source, out, RECIPES["fast"])
    _run(source, out, RECIPES["fast"], RunOptions(device="cpu", save_every=0, overwrite=True))
    _run(source, tmp_path / "whole", RECIPES["fast"])
    assert _contents(out) == _contents(tmp_path / "whole")
    assert not _kept(out).exists()


def test_going_on_with_another_torch_is_told(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    _stopped(source, out, monkeypatch)
    journal = json.loads((_kept(out) / "journal.json").read_text())
    journal["environment"]["torch"] = "2.0"
    (_kept(out) / "journal.json").write_text(json.dumps(journal))
    events: list[object] = []
    _run(source, out, RECIPES["fast"], emit=events.append)
    assert any(isinstance(each, Caution) and "torch was 2.0, is " in each.text for each in events)


@pytest.mark.kills
def test_killed_at_random_moments_a_run_ends_with_the_bytes_of_an_unbroken_one(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{number}" for number in range(6000)), encoding="utf-8")
    script = tmp_path / "run.py"
    script.write_text(_SCRIPT, encoding="utf-8")

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(script), str(source), str(out)]
        return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE)

    begun = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    whole = time.monotonic() - begun
    draw, kills, out = random.Random(0), 0, tmp_path / "out"
    for _ in range(60):
        process = start(out)
        assert process.stdout is not None
        process.stdout.readline()  # imports are done: the run begins
        try:
            process.wait(timeout=draw.uniform(0.0, 0.5) * whole)
            assert process.returncode == 0
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            if out.exists():  # all was written, only Python had not ended yet
                break
            if kills == 12:
                assert start(out).wait() == 0
                break
    assert kills >= 2
    assert _contents(out) == _contents(tmp_path / "whole")
    assert not _kept(out).exists()
    shutil.rmtree(out)


_SCRIPT = f"""
import sys
from awqkit import Recipe, RunOptions, quantize
import awqkit.api.quantize
print("begins", flush=True)
recipe = Recipe.preset("balanced", group_size=32, bits=3, format="compressed-tensors", generated=0.2)
quantize(sys.argv[1], sys.argv[2], recipe, calibration={ROWS!r}, options=RunOptions(device="cpu", save_every=0))
"""
