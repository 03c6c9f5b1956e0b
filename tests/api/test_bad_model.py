"""A MODEL that cannot be quantized is refused in one line before any work, and nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_folders import TOKENIZER_FILES, Place, change_config, change_tensors, make_model, save_folder

CALIBRATED = ("calibration: ",)  # the notice that comes before discovery


def test_a_folder_that_is_missing(refused):
    line = refused(model="./nowhere")
    assert line == "./nowhere: no such directory; expected a folder with config.json and *.safetensors"


def test_a_hub_id_without_a_hub(refused, monkeypatch):
    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("offline")

    monkeypatch.setattr("socket.getaddrinfo", unreachable)
    monkeypatch.setattr("socket.socket.connect", unreachable)
    line = refused(model="someone/some-model")
    assert line.startswith("someone/some-model: no such directory, and the Hugging Face hub could not give a model")
    assert "cannot be reached" in line


def test_an_empty_folder(refused, place):
    (place.root / "void").mkdir()
    assert refused(model="void") == "void: is empty; expected config.json and *.safetensors"


def test_a_file_in_place_of_a_folder(refused):
    assert refused(model="text.txt").startswith("text.txt: is a file; give the folder that holds config.json")


def test_pickled_weights_only(refused, place):
    (place.model / "model.safetensors").rename(place.model / "pytorch_model.bin")
    line = refused()
    assert line.startswith("model: holds pickled weights only (pytorch_model.bin)")
    assert "convert them to safetensors" in line


def test_no_weights_at_all(refused, place):
    (place.model / "model.safetensors").unlink()
    assert refused().startswith("model: holds no *.safetensors file; expected model.safetensors or")


@pytest.mark.parametrize("kept_bytes", [0, 4, 1000, -1000])
def test_a_truncated_file(refused, place, kept_bytes):
    file = place.model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept_bytes])
    line = refused()
    assert line.startswith("model/model.safetensors: truncated: ")
    assert line.endswith("fetch or copy this file again")


@pytest.mark.parametrize(("at", "damage"), [(8, b"\0\0\0"), (10, b"\xff\xfe"), (7, b"\x7f")])
def test_a_corrupt_header(refused, place, at, damage):
    file = place.model / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:at] + damage + data[at + len(damage) :])
    line = refused()
    assert line.startswith("model/model.safetensors: not a sound safetensors file: the header ")
    assert "codec" not in line


@pytest.fixture
def sharded(place: Place) -> Place:
    """The place with its model in several shards."""
    for name in ("model.safetensors", "config.json"):
        (place.model / name).unlink()
    make_model(place.model, max_shard_size="300KB")
    return place


def test_a_truncated_shard(refused, sharded):
    shard = sorted(sharded.model.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert refused().startswith(f"{shard}: truncated: ")


def test_an_index_that_names_a_missing_shard(refused, sharded):
    shard = sorted(sharded.model.glob("*.safetensors"))[-1]
    shard.unlink()
    line = refused()
    assert line.startswith("model/model.safetensors.index.json: names the shard ")
    assert shard.name in line


def test_shards_without_their_index(refused, sharded):
    (sharded.model / "model.safetensors.index.json").unlink()
    assert "no model.safetensors.index.json that says which tensor is where" in refused()


def test_no_config(refused, place):
    (place.model / "config.json").unlink()
    assert refused() == "model: holds no config.json; copy it from where the weights come from"


def test_a_config_without_architectures(refused, place):
    change_config(place.model, "architectures")
    assert refused().startswith('model/config.json: has no "architectures", so the model class is not known; add it')


def test_a_config_that_is_not_json(refused, place):
    (place.model / "config.json").write_text('{"architectures": ')
    line = refused()
    assert line.startswith("model/config.json: not JSON (")
    assert "fetch or copy this file again" in line


def test_a_model_that_transformers_does_not_know(refused, place):
    change_config(place.model, model_type="zzz9", architectures=["Zzz9ForCausalLM"])
    line = refused()
    assert line.startswith("model/config.json: transformers cannot use it (")
    assert "`zzz9`" in line
    assert "pip install -U transformers" in line


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"num_attention_heads": "four"}, "'num_attention_heads' expected int, got str"),
        ({"hidden_act": "nosuch"}, "KeyError: 'nosuch'"),
        ({"model_type": None}, "model type `None`"),
    ],
)
def test_a_config_that_transformers_cannot_use(refused, place, values, found):
    change_config(place.model, **values)
    assert found in refused()


@pytest.mark.parametrize("values", [{}, {"model_type": "zzz9"}])
def test_a_model_with_code_of_its_own_runs_it_only_with_leave(refused, place, values):
    code = "from pathlib import Path\nPath('ran').touch()\nfrom transformers import LlamaConfig as OwnConfig\n"
    (place.model / "own.py").write_text(code)
    change_config(place.model, auto_map={"AutoConfig": "own.OwnConfig"}, **{"model_type": "own", **values})
    assert refused() == (
        "model: this model runs code of its own (auto_map in config.json); "
        "read that code, then pass --trust-remote-code"
    )


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "has quantization_config (method 'gptq')"),
        ({"compression_config": {"quant_method": "x"}}, "has compression_config (method 'x')"),
    ],
)
def test_a_model_that_is_quantized_already(refused, place, values, found):
    change_config(place.model, **values)
    line = refused()
    assert line.startswith(f"model/config.json: {found}: the model is quantized already; give the original ")


def test_our_own_output_is_quantized_already(refused, quantize):
    assert quantize("--method", "rtn").code == 0
    line = refused("--method", "rtn", model="out", out="again")
    assert "has quantization_config (method 'awq'): the model is quantized already" in line


def test_a_tokenizer_that_is_missing(refused, place):
    for name in TOKENIZER_FILES:
        (place.model / name).unlink()
    assert refused().startswith("model: no tokenizer (tokenizer.json, ")


def test_a_tokenizer_that_cannot_be_read(refused, place):
    (place.model / "tokenizer.json").write_text("{}")
    line = refused()
    assert line.startswith("model: the tokenizer cannot be loaded (")
    assert line.endswith("copy the tokenizer files of the original model into it again")


def test_plain_rounding_needs_no_tokenizer(quantize, place):
    for name in TOKENIZER_FILES:
        (place.model / name).unlink()
    assert quantize("--method", "rtn").code == 0


def test_a_tokenizer_of_another_model(refused, place):
    change_config(place.model, vocab_size=1000)
    key = "model.embed_tokens.weight"
    change_tensors(place.model, lambda tensors: tensors.update({key: tensors[key][:1000].contiguous()}))
    line = refused()
    assert "lies outside the model's vocabulary of 1000; the tokenizer is not this model's" in line


def test_a_tensor_that_is_missing(refused, place):
    change_tensors(place.model, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    line = refused()
    assert "config.json asks for, model.layers.1.mlp.up_proj.weight is missing; fetch " in line


def test_blocks_that_are_missing(refused, place):
    change_config(place.model, num_hidden_layers=3)
    assert "model.layers.2.self_attn.q_proj.weight is missing (and 8 more); fetch " in refused()


def test_a_tensor_of_another_shape(refused, place):
    key = "model.layers.1.mlp.up_proj.weight"
    change_tensors(place.model, lambda tensors: tensors.update({key: tensors[key][:96].contiguous()}))
    line = refused()
    assert line.startswith(f"model/model.safetensors: tensor {key} is [96, 64], but config.json makes it [128, 64]; ")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_are_not_full_precision(refused, place, dtype):
    key = "model.layers.0.mlp.up_proj.weight"
    change_tensors(place.model, lambda tensors: tensors.update({key: tensors[key].to(dtype)}))
    line = refused()
    assert f"tensor {key} is {str(dtype).removeprefix('torch.')}; give the original model with bf16, fp16" in line


def test_no_blocks(refused, place):
    change_config(place.model, num_hidden_layers=0)
    assert "no list of decoder blocks found in LlamaForCausalLM" in refused()


def test_an_encoder(refused, place):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    save_folder(BertForMaskedLM(config), place.root / "encoder")
    line = refused(model="encoder", after=CALIBRATED)
    assert line.endswith("a token sees the ones after it, so this is an encoder; awqkit takes decoder-only models")
    # and the libraries underneath add nothing of their own
    command = [sys.executable, "-m", "awqkit", "quantize", "encoder", "out", "--calibration", "text.txt"]
    done = subprocess.run([*command, "--samples", "2", "--seq-len", "32"], capture_output=True, text=True)
    assert done.returncode == 1
    assert [text.split(":")[0] for text in done.stderr.splitlines()] == ["calibration", "awqkit"]
    assert not os.path.lexists("out")


@pytest.mark.parametrize(
    ("model_type", "found"),
    [
        ("t5", "model_type 't5' is an encoder-decoder model; awqkit takes decoder-only ones"),
        ("vit", "transformers has no causal language model for model_type 'vit'; awqkit takes decoder-only models"),
    ],
)
def test_other_models_that_are_no_decoders(refused, place, model_type, found):
    change_config(place.model, model_type=model_type)
    assert refused() == f"model: {found}"


def test_a_block_without_linears(refused, place, monkeypatch):
    monkeypatch.setattr("awqkit.model.folds.matrix_parameters", lambda block: {})
    line = refused(after=CALIBRATED)
    assert "model.layers.0: nothing to quantize, no weight of this block is used as a linear" in line


def test_a_fresh_process_says_the_same(place):
    """One case from the shell: what this process has imported already makes no difference."""
    (place.model / "model.safetensors").write_bytes(b"")
    before = place.contents()
    command = [sys.executable, "-m", "awqkit", "quantize", "model", "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("awqkit: error: model/model.safetensors: truncated: ")
    assert place.contents() == before


def test_tensors_that_the_model_does_not_use_are_copied_and_named(quantize, place):
    change_tensors(place.model, lambda tensors: tensors.update({"extra.weight": torch.ones(3, dtype=torch.float64)}))
    outcome = quantize("--method", "rtn")
    assert "copied as they are, the model does not use them: extra.weight" in outcome.err.splitlines()
    report = json.loads(Path("out/awqkit.json").read_text())
    assert "extra.weight" not in report["dropped"]
