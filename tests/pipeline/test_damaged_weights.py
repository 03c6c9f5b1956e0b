"""NaN and inf stop the run where they are read, name their tensor and leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_contexts import GROUP, run_on
from tiny_models import save_tiny, tiny_model

from awqkit import Recipe
from awqkit.errors import CheckpointError


@pytest.mark.parametrize("recipe", [Recipe.preset("fast", group_size=GROUP), Recipe.method("rtn", group_size=GROUP)])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.1.mlp.down_proj.weight", float("nan")),
        ("model.layers.0.input_layernorm.weight", float("inf")),
        ("model.norm.weight", float("nan")),
        ("lm_head.weight", float("-inf")),
    ],
)
def test_a_damaged_tensor_is_named_and_nothing_is_left(name: str, value: float, recipe: Recipe, tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[7] = value
    save_tiny(model, tmp_path / "source")
    with pytest.raises(CheckpointError) as refused:
        run_on(model, tmp_path, recipe)
    message = str(refused.value)
    assert name in message
    assert "NaN or inf" in message
    assert "\n" not in message
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]
