"""A mixture of experts: stacked experts stay in full precision, and everyone is told so."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import token_rows
from transformers import AutoConfig, AutoModelForCausalLM

from awqkit import Recipe, RunOptions, convert, load, quantize

SIZES = {
    "vocab_size": 192, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "mixtral": ({"num_local_experts": 4}, "block_sparse_moe.experts"),
    "qwen3_moe": ({"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}, "mlp.experts"),
}


@pytest.fixture(scope="module", params=[(name, form) for name in MODELS for form in ("awq", "compressed-tensors")])
def done(request, tmp_path_factory):
    model_type, form = request.param
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES, **MODELS[model_type][0]))
    folder = tmp_path_factory.mktemp(model_type)
    model.to(torch.bfloat16).save_pretrained(folder / "source")
    recipe = Recipe.preset("fast", group_size=32, format=form)
    quantize(
        folder / "source", folder / "out", recipe, calibration=token_rows(18, 24), options=RunOptions(device="cpu")
    )
    return folder, form, MODELS[model_type][1], model.float()


def test_experts_are_written_as_they_were(done):
    folder, _, experts, _ = done
    before, after = (load_file(folder / part / "model.safetensors") for part in ("source", "out"))
    names = [name for name in before if experts in name]
    assert len(names) == 2 * 4 * 3
    assert all(torch.equal(before[name], after[name]) for name in names)


def test_they_are_among_what_was_kept(done):
    folder, *_ = done
    report = json.loads((folder / "out/awqkit.json").read_text())
    kept = {keep["name"]: keep["reason"] for block in report["blocks"] for keep in block["kept"]}
    assert "several matrices in one parameter" in kept["model.layers.1.mlp.experts.gate_up_proj"]


def test_the_router_is_kept_with_a_scale_that_its_rounding_commutes_with(done):
    folder, _, experts, _ = done
    report = json.loads((folder / "out/awqkit.json").read_text())
    kept = {keep["name"]: keep["reason"] for block in report["blocks"] for keep in block["kept"]}
    assert "chooses experts" in kept["model.layers.0.mlp.gate"]
    before, after = (load_file(folder / part / "model.safetensors") for part in ("source", "out"))
    name = f"model.layers.0.{experts.rpartition('.')[0]}.gate.weight"
    ratio = after[name].float() / before[name].float()
    assert torch.equal(ratio, torch.exp2(ratio.log2().round()))


def test_readers_are_told_by_the_names_that_they_ask_for(done):
    folder, form, experts, _ = done
    settings = json.loads((folder / "out/config.json").read_text())["quantization_config"]
    listed = settings["modules_to_not_convert" if form == "awq" else "ignore"]
    assert f"model.layers.0.{experts}" in listed
    below = [entry for entry in listed if entry.startswith(f"model.layers.0.{experts}.")]
    if form == "awq":  # an entry covers what lies below it
        assert below == []
    else:
        assert len([entry for entry in below if entry.split(".")[-2].isdigit()]) == 4 * 3


def test_what_is_loaded_has_the_experts_in_their_places(done):
    folder, _, _, model = done
    loaded = load(folder / "out", dtype=torch.float32, device="cpu")
    for name, value in model.named_parameters():
        if "experts" in name:
            assert torch.equal(loaded.get_parameter(name), value)


def test_a_conversion_tells_readers_what_a_run_tells_them(done, tmp_path):
    folder, form, experts, _ = done
    other = "compressed-tensors" if form == "awq" else "awq"
    convert(folder / "out", tmp_path / "other", format=other)
    settings = json.loads((tmp_path / "other/config.json").read_text())["quantization_config"]
    listed = settings["modules_to_not_convert" if other == "awq" else "ignore"]
    assert f"model.layers.0.{experts}" in listed
    below = [entry for entry in listed if entry.startswith(f"model.layers.0.{experts}.")]
    assert len([entry for entry in below if entry.split(".")[-2].isdigit()]) == (0 if other == "awq" else 4 * 3)
