"""A model that brings its own code, under names that nobody knows, is handled like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import token_rows

from awqkit import Recipe, RunOptions, load, quantize
from awqkit.api.folds import folds
from awqkit.errors import CheckpointError
from awqkit.numerics.grid import dequantize
from awqkit.pipeline import run as pipeline_run

CODE = """
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(self, width=64, depth=2, words=192, **rest):
        super().__init__(**rest)
        self.width, self.depth, self.words = width, depth, words


class Scaled(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.g = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.g


class Storey(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.before, self.after = Scaled(width), Scaled(width)
        self.mix = nn.Linear(width, 3 * width, bias=False)
        self.join = nn.Linear(width, width)
        self.wide = nn.Parameter(torch.zeros(width, 2 * width))
        self.narrow = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.mix(self.before(x)).chunk(3, -1))
        x = x + self.join(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.narrow(F.relu(self.after(x) @ self.wide))


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.words, config.width)
        self.tower = nn.ModuleList(Storey(config.width) for _ in range(config.depth))
        self.say = nn.Linear(config.width, config.words, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, attention_mask=None, use_cache=None, **rest):
        x = self.words(input_ids)
        for storey in self.tower:
            x = storey(x)
        return CausalLMOutput(logits=self.say(x))
"""
TRUSTED = RunOptions(device="cpu", trust_remote_code=True)
AUTO_MAP = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote") / "own-model"
    folder.mkdir()
    (folder / "own.py").write_text(CODE)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "own", "architectures": ["OwnModel"], "auto_map": AUTO_MAP, "dtype": "bfloat16"})
    )
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, value in _model(folder).state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        fresh = 1 + 0.5 * noise if name.endswith(".g") else noise * value.shape[-1] ** -0.5
        tensors[name] = fresh.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _model(folder: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    return AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor(token_rows(2, 16, seed=5))).logits


def test_folds_of_unknown_names_are_found(own: Path) -> None:
    (kind,) = folds(own, options=TRUSTED).kinds
    assert kind.blocks == (0, 1) and all(fold.exact for fold in kind.folds)
    assert set(kind.linears) == {"mix", "join", "wide", "narrow"}
    consumers = {fold.consumers for fold in kind.folds}
    assert {("mix",), ("wide",), ("narrow",), ("join",)} == consumers


@pytest.mark.parametrize("preset", ["fast", "balanced"])
def test_it_is_loaded_as_it_was_simulated(
    own: Path, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated, quantize_block = {}, pipeline_run.quantize_block

    def recorded(context: Any, *arguments: Any) -> Any:
        result = quantize_block(context, *arguments)
        path, structure = context.block_plan.path, context.structure
        simulated.update({f"{path}.{name}": value.bfloat16().float() for name, value in result.stored.items()})
        for name, weight in result.quantized.items():
            view = structure.linear(name)
            simulated[f"{path}.{view.weight}"] = view.oriented(dequantize(weight.codes, weight.grid))
        return result

    monkeypatch.setattr(pipeline_run, "quantize_block", recorded)
    recipe = Recipe.preset(preset, group_size=32, generated=0.0)
    done = quantize(own, tmp_path / "out", recipe, calibration=token_rows(18, 24), options=TRUSTED)
    assert (tmp_path / "out" / "own.py").read_text() == CODE
    expected = load(own, dtype=torch.float32, device="cpu", trust_remote_code=True)
    original = _logits(expected)
    parameters = dict(expected.named_parameters())
    with torch.no_grad():
        for name, value in simulated.items():
            parameters[name].copy_(value)
    found = _logits(load(done.directory, dtype=torch.float32, device="cpu", trust_remote_code=True))
    torch.testing.assert_close(found, _logits(expected), rtol=1e-4, atol=1e-4)
    assert float((found - original).norm() / original.norm()) > 1e-3


def test_without_leave_its_code_is_not_run(own: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="runs code of its own"):
        quantize(own, tmp_path / "out", calibration=token_rows(18, 24), options=RunOptions(device="cpu"))
    assert not (tmp_path / "out").exists()
