"""Blocks that text alone does not reach stay as they are, and a run says so."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny_contexts import GROUP, run_on, written
from tiny_models import MLP_WIDTH, VOCABULARY, WIDTH, token_rows

from awqkit import Recipe, load
from awqkit.events import Caution


def test_cross_attention_to_images_is_left_alone(tmp_path: Path) -> None:
    from transformers import MllamaForCausalLM
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig

    config = MllamaTextConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=MLP_WIDTH, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, cross_attention_layers=[1], pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model, events = MllamaForCausalLM(config).eval(), []
    done = run_on(model, tmp_path, Recipe.preset("fast", group_size=GROUP), emit=events.append)
    said = [event.text for event in events if isinstance(event, Caution)]
    assert "not called for text alone, so in full precision: model.layers.1" in said
    names = written(done.directory)
    assert not any(name.startswith("model.layers.1.") and name.endswith("qweight") for name in names)
    assert all(f"model.layers.{block}.self_attn.o_proj.qweight" in names for block in (0, 2))
    kept = json.loads((done.directory / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert {"model.layers.1.cross_attn.q_proj", "model.layers.1.mlp.up_proj"} <= set(kept)
    loaded = load(done.directory, dtype=torch.float32, device="cpu")
    ids = torch.tensor(token_rows(2, 12))
    with torch.no_grad():
        expected, found = model(ids, use_cache=False).logits, loaded(ids, use_cache=False).logits
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.2
