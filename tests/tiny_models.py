"""Tiny decoders of several families with random weights, made here so that no test needs a download.

Their norms have outlier channels and their biases are not zero, so that a channel scale pays and a wrong one shows.
The families differ where fold discovery must cope: grouped queries, biases, norms by 1 + w, sandwich norms, LayerNorm,
a parallel block, fused projections.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 192
WIDTH = 64
MLP_WIDTH = 96
NUM_BLOCKS = 2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": MLP_WIDTH,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "tie_word_embeddings": True}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "gemma2": {"model_type": "gemma2", "layer_types": ["sliding_attention", "full_attention"], **_GEMMA},
    "gemma3": {"model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"], **_GEMMA},
    "opt": {
        "model_type": "opt",
        "ffn_dim": MLP_WIDTH,
        "word_embed_proj_dim": WIDTH,
        "do_layer_norm_before": True,
        "tie_word_embeddings": True,
    },
    "starcoder2": {"model_type": "starcoder2", "use_bias": True},
    "cohere": {"model_type": "cohere", "logit_scale": 1.0},
    "phi3": {"model_type": "phi3"},
}

# Their blocks hand the next ones more than hidden states: a router's state, chosen tokens, keys and values by way of a
# mapping. Gemma 4 and Zamba also give each block something of the very tokens.
HANDING_ON: dict[str, dict[str, Any]] = {
    "zaya": {
        "model_type": "zaya",
        "num_hidden_layers": 3,
        "layer_types": ["hybrid"] * 3,
        "moe_intermediate_size": MLP_WIDTH,
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "head_dim": 16,
        "router_hidden_size": 32,
    },
    "glm_moe_dsa": {
        "model_type": "glm_moe_dsa",
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "moe_intermediate_size": MLP_WIDTH,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "index_topk": 6,
        "index_head_dim": 32,
        "index_n_heads": 4,
        "mlp_layer_types": ["dense", "dense", "dense"],
        "indexer_types": ["full", "shared", "shared"],
        "layer_types": ["indexed_attention"] * 3,
    },
    "gemma4": {
        "model_type": "gemma4_text",
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
        "head_dim": 16,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": VOCABULARY,
        "sliding_window": 8,
        "tie_word_embeddings": True,
    },
}

# The transformer of its hybrid blocks is one and the same.
SHARING: dict[str, dict[str, Any]] = {
    "zamba2": {
        "model_type": "zamba2",
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "hybrid_layer_ids": [1, 3],
        "num_key_value_heads": 4,
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 32,
        "n_mamba_heads": 8,
        "mamba_d_state": 16,
        "mamba_ngroups": 1,
        "mamba_headdim": 16,
        "tie_word_embeddings": True,
    }
}


def tiny_model(family: str, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **overrides: Any) -> Any:
    """A model of the family in eval mode whose float32 parameters are exact in `dtype`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    choices = {**_COMMON, **(FAMILIES | HANDING_ON | SHARING)[family], **overrides}
    config = AutoConfig.for_model(choices.pop("model_type"), **choices)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    _randomize(model, dtype, torch.Generator().manual_seed(seed))
    return model


def save_tiny(model: Any, directory: Path, dtype: torch.dtype = torch.bfloat16, **choices: Any) -> Path:
    """The model's folder, its tensors stored in `dtype`; `model` stays as it is."""
    from copy import deepcopy

    deepcopy(model).to(dtype).save_pretrained(directory, **choices)
    return directory


def token_rows(rows: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """Rows of random ids that start with the token 1."""
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 1
    return ids.tolist()


def block_probes(model: Any, described: Any = None) -> tuple[Any, Any, list[Any]]:
    """The model's Skeleton, a probe, and what discovery finds in each of its blocks.

    described: what the Skeleton gets of the model, its config where None.
    """
    from awqkit.model.skeleton import Skeleton
    from awqkit.pipeline.plan import discover_blocks, make_probe

    cpu = torch.device("cpu")
    skeleton = Skeleton(model.config if described is None else described, WeightsOf(model))
    probe = make_probe(skeleton, cpu)
    return skeleton, probe, discover_blocks(skeleton, probe, cpu)


class WeightsOf:
    """A model's tensors where a checkpoint is expected (`WeightSource`); a tied tensor is there once."""

    def __init__(self, model: Any) -> None:
        self._tensors = dict(model.named_parameters())

    @property
    def names(self) -> Iterable[str]:
        return self._tensors

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach().clone()


def _randomize(model: Any, dtype: torch.dtype, generator: torch.Generator) -> None:
    adds_one = "Gemma" in type(model).__name__
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("bias"):
            fresh = 0.2 * noise
        elif value.dim() == 1:
            gain = 1.0 + 0.2 * noise
            if ".layers." in name:
                gain[torch.randperm(len(gain), generator=generator)[:3]] *= 8.0
            else:
                gain *= 0.15  # the last norm: keeps the logits of a random head within a few units
            fresh = gain - 1.0 if adds_one else gain
        elif "embed" in name:
            fresh = noise
        else:
            columns = torch.exp(0.4 * torch.randn(value.shape[-1], generator=generator))
            fresh = noise * columns / value.shape[-1] ** 0.5
        value.data = fresh.to(dtype).to(torch.float32)
