"""The config of a text part, which transformers maps only inside a larger one, is built as its own causal model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import WIDTH, save_tiny

from awqkit.errors import ModelError
from awqkit.model.transformers_bridge import empty_model, full_model

SMALL = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def test_it_is_built_and_loaded(tmp_path: Path) -> None:
    from transformers import Emu3ForCausalLM, Emu3TextConfig

    config = Emu3TextConfig(**SMALL)
    assert type(empty_model(config)) is Emu3ForCausalLM
    saved = Emu3ForCausalLM(config).eval()
    loaded = full_model(save_tiny(saved, tmp_path / "part", torch.float32), torch.float32, torch.device("cpu"))
    ids = torch.arange(3, 12).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, saved(ids).logits)


def test_a_part_of_which_there_is_no_causal_model_is_refused() -> None:
    from transformers import CLIPTextConfig

    with pytest.raises(ModelError, match="no causal language model for model_type 'clip_text_model'"):
        empty_model(CLIPTextConfig(hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=4))
