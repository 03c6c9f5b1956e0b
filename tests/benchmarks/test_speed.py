"""Checkpoints of known shapes are ones that `quantize` takes, and what is measured of a run on them is all there."""

from __future__ import annotations

from pathlib import Path

import pytest
import shapes
import speed
import torch

from awqkit.checkpoint.reader import Checkpoint


@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
def test_a_run_on_a_shape_is_measured(name: str, tmp_path: Path) -> None:
    folder = shapes.write_shape(name, tmp_path / name, blocks=2, vocab=128)
    task = speed.Task(folder, "fast", 8, 16, whole_model=False, most=None)
    found = speed.one(task, torch.device("cpu"))
    assert found["blocks"] == 2
    assert {"read", "observe", "search", "check", "write"} <= found["block_stages"].keys()
    assert found["floor"].keys() == {"read", "forward", "grams", "write"}
    assert found["anonymous_peak"] <= found["resident_peak"]
    assert found["device_peak"] is None
    assert speed.estimated(task, torch.device("cpu"))["total_seconds"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {name}


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_a_shape_has_the_tensors_of_its_model(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    known = {**shapes.SHAPES[name], "num_hidden_layers": 1, "vocab_size": 64}
    config = AutoConfig.for_model(**known)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = sum(value.numel() for value in model.parameters())
    assert sum(torch.Size(shape).numel() for _, shape in shapes.tensors(known)) == wanted


def test_equal_seeds_write_equal_checkpoints(tmp_path: Path) -> None:
    first, second = (shapes.write_shape("tiny", tmp_path / each, blocks=1) for each in ("a", "b"))
    names = Checkpoint.open(first).names
    assert all(torch.equal(Checkpoint.open(first).read(name), Checkpoint.open(second).read(name)) for name in names)
