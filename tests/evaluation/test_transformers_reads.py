"""transformers' own compressed-tensors path loads what we write: no missing and no unexpected keys, our logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_contexts import run_on, token_ids
from tiny_models import FAMILIES, tiny_model
from torch import Tensor, nn

from awqkit import Recipe, load
from awqkit.evaluation.int8_linear import Int8Linear
from awqkit.evaluation.packed_linear import PackedLinear
from awqkit.numerics.grid import dequantize

pytest.importorskip("compressed_tensors", reason="the independent reader, compressed-tensors, is not installed")

FORMAT = "compressed-tensors"
W8A8: dict[str, Any] = {"bits": 8, "group_size": -1, "symmetric": True, "activations": "int8"}


def recipe_of(**choices: Any) -> Recipe:
    return Recipe.method("rtn", format=FORMAT, **choices)


def read_by_transformers(directory: Path, *, dequantize: bool) -> nn.Module:
    """The model in float32. Fails where a tensor of the model is not in the folder, or the other way round."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model, found = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True, **how)
    assert {key: names for key, names in found.items() if names} == {}
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(token_ids(4, 20, seed=9)).logits.float()


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("family", "bits", "group_size"),
    [
        *((family, 4, 32) for family in FAMILIES),
        *(("llama", *grid) for grid in [(4, -1), (3, 16), (2, 32), (8, 32), (8, -1)]),
    ],
)
def test_symmetric_loads_by_default_and_computes_what_we_do(
    family: str, bits: int, group_size: int, tmp_path: Path
) -> None:
    recipe = recipe_of(bits=bits, group_size=group_size, symmetric=True)
    directory = run_on(tiny_model(family), tmp_path, recipe).directory
    theirs = read_by_transformers(directory, dequantize=False)
    ours = load(directory, dtype=torch.float32, device="cpu")
    assert all(type(module) is PackedLinear for path, module in ours.named_modules() if path.endswith("_proj"))
    assert distance(logits(theirs), logits(ours)) < 1e-5


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, -1), (3, 32), (2, 16), (8, 32)])
def test_asymmetric_loads_dequantized_with_our_weights_in_the_scales_dtype(
    bits: int, group_size: int, tmp_path: Path
) -> None:
    directory = run_on(tiny_model("llama"), tmp_path, recipe_of(bits=bits, group_size=group_size)).directory
    theirs = dict(read_by_transformers(directory, dequantize=True).named_parameters())
    ours = load(directory, dtype=torch.float32, device="cpu")
    packed = {path: module for path, module in ours.named_modules() if isinstance(module, PackedLinear)}
    assert len(packed) == 14
    for path, module in packed.items():
        weight = module.quantized_weight()
        expected = dequantize(weight.codes, weight.grid).to(torch.bfloat16).float()
        assert torch.equal(theirs[f"{path}.weight"], expected)


def test_w8a8_loads_with_our_weights_and_rounds_its_inputs(tmp_path: Path) -> None:
    model = tiny_model("llama")
    directory = run_on(model, tmp_path, recipe_of(**W8A8)).directory
    theirs = read_by_transformers(directory, dequantize=False)
    ours = load(directory, dtype=torch.float32, device="cpu")
    by_them, by_us = logits(theirs), logits(ours)  # the first forward unpacks their weights
    linears = {path: module for path, module in ours.named_modules() if isinstance(module, Int8Linear)}
    assert len(linears) == 14
    weights = dict(theirs.named_parameters())
    for path, module in linears.items():
        weight = module.quantized_weight()
        assert torch.equal(weights[f"{path}.weight"], dequantize(weight.codes, weight.grid))
    # they divide by max / 127.5, we by max / 127 as vLLM does: each is nearer to the other than to the original
    original = logits(model)
    assert distance(by_them, by_us) < 0.1 < distance(by_us, original)


@pytest.mark.parametrize("name", ["rtn", "fast"])
@pytest.mark.parametrize("choices", [{"bits": 3, "group_size": -1}, {"bits": 8, "group_size": 16}, W8A8], ids=str)
def test_what_is_written_is_near_the_original_at_the_bits_that_it_has(
    name: str, choices: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    make = Recipe.method if name == "rtn" else Recipe.preset
    result = run_on(model, tmp_path, make(name, format=FORMAT, **choices))
    found = logits(load(result.directory, dtype=torch.float32, device="cpu"))
    bounds = {("rtn", 3): 1.2, ("fast", 3): 0.85, ("rtn", 8): 0.25, ("fast", 8): 0.18}
    assert distance(found, logits(model)) < bounds[name, choices["bits"]]
    groups = {linear.group_size for block in result.report.blocks for linear in block.linears}
    assert groups == ({64, 96} if choices["group_size"] == -1 else {16})
    assert "groups of -1" not in str(result.report)


def test_bits_per_weight_count_scales_and_zero_points(tmp_path: Path) -> None:
    result = run_on(tiny_model("llama"), tmp_path, recipe_of(bits=3, group_size=32))
    assert result.report.bits_per_weight == pytest.approx(3 + (16 + 3) / 32, abs=0.03)  # and 128 bits of shape


def test_kept_linears_are_left_alone_by_readers(tmp_path: Path) -> None:
    recipe = recipe_of(bits=4, group_size=32, symmetric=True, ignore=("*.0.mlp.down_proj", "*.k_proj"))
    directory = run_on(tiny_model("llama"), tmp_path, recipe).directory
    ignored = json.loads((directory / "config.json").read_text())["quantization_config"]["ignore"]
    attention = [f"model.layers.{i}.self_attn.{part}_proj" for i in (0, 1) for part in "kqv"]
    assert ignored == [*sorted(["model.layers.0.mlp.down_proj", *attention]), "lm_head"]
    theirs, ours = read_by_transformers(directory, dequantize=False), load(directory, dtype=torch.float32, device="cpu")
    assert distance(logits(theirs), logits(ours)) < 1e-5


@pytest.mark.parametrize(("format_name", "tag"), [("awq", "awq"), (FORMAT, FORMAT)])
def test_the_model_card_names_the_format(format_name: str, tag: str, tmp_path: Path) -> None:
    directory = run_on(tiny_model("llama"), tmp_path, Recipe.method("rtn", format=format_name, group_size=32)).directory
    card = (directory / "README.md").read_text()
    assert f"- {tag}\n" in card
    assert f"| format | {'AWQ (`gemm`)' if tag == 'awq' else 'compressed-tensors (`pack-quantized`)'} |" in card
    assert ("dequantize=True" in card) == (tag == FORMAT)
