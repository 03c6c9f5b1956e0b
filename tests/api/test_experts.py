"""A mixture of experts: each expert a linear of its own on disk, in few bits, and back in its stack when loaded."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import token_rows
from transformers import AutoConfig, AutoModelForCausalLM

from awqkit import Recipe, RunOptions, convert, load, quantize
from awqkit.formats.format import stored_format
from awqkit.numerics.grid import dequantize

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


def _layers(folder, experts):
    """Names of the experts' linears on disk."""
    return [
        f"model.layers.{layer}.{experts}.{number}.{part}"
        for layer in range(2) for number in range(4)
        for part in (("w1", "w2", "w3") if "sparse" in experts else ("gate_proj", "up_proj", "down_proj"))
    ]  # fmt: skip


def test_every_expert_is_written_in_few_bits_under_its_name_on_disk(done):
    folder, form, experts, _ = done
    tensors = load_file(folder / "out/model.safetensors")
    suffix = "qweight" if form == "awq" else "weight_packed"
    assert all(f"{name}.{suffix}" in tensors for name in _layers(folder, experts))
    assert not [name for name in tensors if experts in name and name.endswith(".weight")]


def test_readers_are_told_of_the_router_and_of_no_expert(done):
    folder, form, experts, _ = done
    settings = json.loads((folder / "out/config.json").read_text())["quantization_config"]
    listed = settings["modules_to_not_convert" if form == "awq" else "ignore"]
    assert f"model.layers.0.{experts.rpartition('.')[0]}.gate" in listed
    assert not [entry for entry in listed if "experts" in entry]


def test_what_is_loaded_has_in_its_stacks_what_the_codes_mean(done):
    """Gate before up, each expert at its number; by the file's tensors and the layout of transformers' own saving."""
    folder, _, experts, model = done
    loaded = load(folder / "out", dtype=torch.float32, device="cpu")
    recovered = {}
    for name, value in loaded.named_parameters():
        if "experts" in name:
            original = model.get_parameter(name)
            distance = ((value - original).norm() / original.norm()).detach()
            assert 0.01 < distance.item() < 0.2
            recovered[name] = value
    assert len(recovered) == 4
    stored, settings = stored_format(json.loads((folder / "out/config.json").read_text()))
    tensors = load_file(folder / "out/model.safetensors")
    gate, up, down = ("w1", "w3", "w2") if "sparse" in experts else ("gate_proj", "up_proj", "down_proj")
    for number in (0, 3):
        parts = [
            dequantize(weight.codes, weight.grid)
            for part in (gate, up, down)
            for weight in [stored.unpack(f"model.layers.1.{experts}.{number}.{part}", tensors, settings.scheme)]
        ]
        assert torch.equal(recovered["model.layers.1.mlp.experts.gate_up_proj"][number], torch.cat(parts[:2]))
        assert torch.equal(recovered["model.layers.1.mlp.experts.down_proj"][number], parts[2])


def test_the_scales_of_an_experts_up_and_down_are_its_own(done):
    folder, *_ = done
    report = json.loads((folder / "out/awqkit.json").read_text())
    folds = {fold["producer"]: fold for fold in report["blocks"][1]["folds"]}
    for number in range(4):
        fold = folds[f"mlp.experts.{number}.gate_up_proj"]
        assert fold["consumers"] == [f"mlp.experts.{number}.down_proj"]
        assert fold["proof_error"] <= 1e-5
    norm = folds["post_attention_layernorm"]
    assert set(norm["consumers"]) == {"mlp.gate", *(f"mlp.experts.{number}.gate_up_proj" for number in range(4))}


def test_an_expert_left_out_keeps_its_whole_block(tmp_path):
    """Readers hold the experts of a block in one stack with one scheme."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **SIZES, **MODELS["mixtral"][0]))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    for form in ("awq", "compressed-tensors"):
        recipe = Recipe.preset("fast", group_size=32, format=form, ignore=("*layers.0*experts.2.*",))
        calibration = token_rows(18, 24)
        done = quantize(
            tmp_path / "source", tmp_path / form, recipe, calibration=calibration, options=RunOptions(device="cpu")
        )
        names = [linear.name for linear in done.report.blocks[0].linears]
        assert not [name for name in names if "experts" in name]
        assert [linear.name for linear in done.report.blocks[1].linears if "experts" in linear.name]
        settings = json.loads((tmp_path / form / "config.json").read_text())["quantization_config"]
        listed = settings["modules_to_not_convert" if form == "awq" else "ignore"]
        assert "model.layers.0.block_sparse_moe.experts" in listed
        below = [entry for entry in listed if entry.startswith("model.layers.0.block_sparse_moe.experts.")]
        assert len(below) == (0 if form == "awq" else 4 * 3)  # an entry of the awq format covers what lies below it
        loaded = load(tmp_path / form, dtype=torch.float32, device="cpu")
        kept = loaded.get_parameter("model.layers.0.mlp.experts.down_proj")
        assert torch.equal(kept, model.get_parameter("model.layers.0.mlp.experts.down_proj").float())


def test_transformers_reads_the_same_experts_from_symmetric_compressed_tensors(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **SIZES, **MODELS["qwen3_moe"][0]))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    recipe = Recipe.preset("fast", group_size=32, format="compressed-tensors", symmetric=True)
    calibration = token_rows(18, 24)
    quantize(tmp_path / "source", tmp_path / "out", recipe, calibration=calibration, options=RunOptions(device="cpu"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = load(tmp_path / "out", dtype=torch.float32, device="cpu")
    for name, value in ours.named_parameters():
        if "experts" in name:
            torch.testing.assert_close(theirs.get_parameter(name).float(), value, rtol=1 / 256, atol=0)


def test_the_router_is_kept_and_compensated(done):
    """Its columns times the very s that the stored norm was divided by, rounded to the file's dtype at most."""
    folder, _, experts, _ = done
    report = json.loads((folder / "out/awqkit.json").read_text())
    kept = {keep["name"]: keep["reason"] for block in report["blocks"] for keep in block["kept"]}
    assert "chooses experts" in kept["model.layers.0.mlp.gate"]
    before, after = (load_file(folder / part / "model.safetensors") for part in ("source", "out"))
    norm = "model.layers.0.post_attention_layernorm.weight"
    s = before[norm].float() / after[norm].float()
    name = f"model.layers.0.{experts.rpartition('.')[0]}.gate.weight"
    assert torch.equal(after[name], (before[name].float() * s).to(torch.bfloat16))
    fold = next(fold for fold in report["blocks"][0]["folds"] if fold["producer"] == "post_attention_layernorm")
    assert fold["kept_columns"] in ("exact", "rounded")
    assert not torch.equal(s, torch.ones_like(s))


def test_a_conversion_has_the_same_experts(done, tmp_path):
    folder, form, *_ = done
    other = "compressed-tensors" if form == "awq" else "awq"
    convert(folder / "out", tmp_path / "other", format=other)
    settings = json.loads((tmp_path / "other/config.json").read_text())["quantization_config"]
    listed = settings["modules_to_not_convert" if other == "awq" else "ignore"]
    assert not [entry for entry in listed if "experts" in entry]
    before, after = (load(path, dtype=torch.float32, device="cpu") for path in (folder / "out", tmp_path / "other"))
    for name, value in before.named_parameters():
        assert torch.equal(after.get_parameter(name), value)
