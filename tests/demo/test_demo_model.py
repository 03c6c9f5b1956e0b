"""The embedded model is what its card says, and the script that made it runs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from awqkit.calibration.builtin import module_sources
from awqkit.calibration.rows import cut_windows, token_stream
from awqkit.demo.held_out import HELD_OUT_MODULES
from awqkit.demo.model import embedded_model
from awqkit.errors import CheckpointError

ROOT = Path(__file__).parents[2]
MAX_BYTES = 12_000_000
MAX_PERPLEXITY = 16  # 13.6 measured on these windows; sources differ a little between versions of Python


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model())


def test_size_shape_and_dtype():
    folder = embedded_model()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MAX_BYTES
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["hidden_size"] % 128 == config["intermediate_size"] % 128 == 0
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - not a dict
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert 3e6 <= sum(tensor.numel() for tensor in tensors) <= 6e6
    assert all(tensor.isfinite().all() for tensor in tensors)


def test_tokenizer_starts_a_text_and_loses_nothing(tokenizer):
    text = "def f(x):\n    return  é + x\t# 漢字\n"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and tokenizer("").input_ids == [tokenizer.bos_token_id]
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == tokenizer.eos_token_id
    assert len(tokenizer) == 4096


def test_held_out_text_is_long_enough(tokenizer):
    texts = module_sources(HELD_OUT_MODULES)
    assert len(texts) == len(HELD_OUT_MODULES)
    # 3.3 characters a token; checked by length, because encoding it all takes seconds
    assert sum(map(len, texts)) / 4 > 60_000


@torch.no_grad()
def test_perplexity_on_held_out_text(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32)
    texts = [text[:4000] for text in module_sources(HELD_OUT_MODULES)]
    stream = token_stream(texts, lambda each: tokenizer(each, add_special_tokens=False)["input_ids"])
    rows = cut_windows(stream.ids, 512, (tokenizer.bos_token_id,))[:12]
    logits = model(rows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    assert math.exp(loss) < MAX_PERPLEXITY


def test_lost_data_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr("awqkit.demo.model.files", lambda package: tmp_path)
    with pytest.raises(CheckpointError, match="install awqkit again"):
        embedded_model()


def test_training_script_writes_a_checkpoint_without_the_held_out_modules(tmp_path):
    library = tmp_path / "lib"
    for name in ["heapq.py", "kept.py", "test/test_heapq.py", "test/test_kept.py"]:
        path = library / name
        path.parent.mkdir(parents=True, exist_ok=True)
        word = "heapsecret" if "heapq" in name else "keptword"
        path.write_text("".join(f"def {word}_{number}(): return {number}\n" for number in range(400)))
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "tools" / "train_demo_model.py"), "--out", str(out), "--stdlib"]
    options = [str(library), "--steps", "2", "--rows", "1", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "held-out perplexity" in done.stdout
    assert (out / "model.safetensors").is_file()
    vocabulary = json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]
    assert any("kept" in token for token in vocabulary)
    assert not any("heap" in token for token in vocabulary)
    assert AutoTokenizer.from_pretrained(out)("a").input_ids[0] == 1
