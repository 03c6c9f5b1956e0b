"""Every causal language model of transformers, built small: the list from its own registry, sizes by their names.

Nothing here knows an architecture: sizes of any config are set by the words in their names, settings that are given
per layer are cut to the first layers of each kind. What that does not reach stands in `architectures.json`.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

VOCABULARY = 320
LAYERS = r"(num|n)_(hidden_)?layers?|(num_)?decoder_layers|n_layers?|num_blocks|num_decoder_layers"

# the first pattern that fits the whole name of a whole-number setting decides; nothing is made larger
SIZES: tuple[tuple[str, int], ...] = (
    (r"(text_)?vocab(ulary)?_size(_per_layer_input)?|embedding_vocab_size|n_vocab", VOCABULARY),
    (r"(hidden|d)_?(size|model)|n_embd|dim|d_embed|embedding_size|emb_dim|word_embed_proj_dim|input_hidden_size", 64),
    (r"attention_hidden_size|lru_width|hidden_size_per_layer_input|dim_model|embed_dim", 64),
    (LAYERS, 2),
    (r"(num|n)_(attention_)?heads?|(encoder|decoder)_attention_heads|n_head|num_decoder_attention_heads", 4),
    (r"linear_num_(key_|value_)?heads", 4),
    (r"(num_)?(key_value|kv)_heads?|n_head_kv|multi_query_group_num", 2),
    (r"((global|attention|swa|linear_key|linear_value)_)?head_(dim|size)|attention_head_size|kv_channels", 16),
    (r"d_kv|d_head|dim_head", 16),
    (r"((moe|expert|shared|swa|mlp|dense)_)*(intermediate|ffn|feed_?forward|ff)_?(hidden_)?(size|dim)", 96),
    (r"(decoder|encoder)_ffn_dim|n_inner|dff|dim_ff|d_ff|d_inner|mlp_hidden_size", 96),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts|num_moe_experts", 4),
    (r"(num_)?(experts?_per_tok(en)?|selected_experts)|moe_(k|topk|top_k)|top_k_experts|num_experts_per_token", 2),
    (r"(n|num)_shared_experts|moe_num_shared_experts|(n|num)_(expert_)?groups?|topk_group", 1),
    (r".*lora_rank|.*_(nope|rope|v)_head_dim|v_head_dim|rotary_dim", 16),
    (r"max_(position_embeddings|seq(uence)?_len(gth)?|(target|source)_positions)|n_positions|n_ctx|seq_length", 128),
    (r"block_size", 128),
    (r"sliding_window(_size)?|attention_window_size|local_attention(_window)?|window_size|attention_chunk_size", 16),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
)  # fmt: skip
PINNED = Path(__file__).resolve().parent / "architectures.json"
SECRETARIAL = {"model_type", "transformers_version", "architectures", "torch_dtype", "dtype"}


def registry() -> dict[str, str]:
    """model_type -> class name of every causal language model that this transformers has."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def settings_by_hand() -> dict[str, dict[str, Any]]:
    """model_type -> settings that words do not reach."""
    return {name: entry.get("config", {}) for name, entry in pinned().items()}


def pinned() -> dict[str, dict[str, Any]]:
    """The data file: model_type -> config (settings by hand), and what is expected of it or why it is not handled."""
    return json.loads(PINNED.read_text(encoding="utf-8"))


def small_config(model_type: str, by_hand: Mapping[str, Any]) -> Any:
    """The default config of an architecture, made small, as a decoder. by_hand: settings that win over the rules."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    settings = small_settings(kind(), by_hand)
    if settings.pop("is_encoder_decoder", False):
        settings["is_encoder_decoder"] = False
    if "is_decoder" in settings:
        settings["is_decoder"] = True
    return kind(**settings | plain_values(settings, by_hand))


def plain_values(settings: Mapping[str, Any], by_hand: Mapping[str, Any]) -> dict[str, Any]:
    """`by_hand` without what is about a config inside this one, which has been made small already."""

    def is_config(value: Any) -> bool:
        return isinstance(value, Mapping) and "model_type" in value

    return {name: value for name, value in by_hand.items() if not is_config(settings.get(name))}


def small_settings(default: Any, by_hand: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a default config with small sizes and few layers."""
    whole = {name: value for name, value in default.to_dict().items() if name not in SECRETARIAL}
    depth = next((value for name, value in whole.items() if re.fullmatch(LAYERS, name) and isinstance(value, int)), 0)
    layers = _one_of_each_kind(whole, depth)
    settings = {}
    for name, value in whole.items():
        if isinstance(value, Mapping) and "model_type" in value and hasattr(getattr(default, name), "to_dict"):
            inner, sub = getattr(default, name), by_hand.get(name, {})
            inside = small_settings(inner, sub)
            settings[name] = {**inside, **plain_values(inside, sub), "model_type": inner.model_type}
        elif isinstance(value, (list, tuple)) and depth and len(value) == depth:
            settings[name] = [value[index] for index in layers]
        elif isinstance(value, Mapping) and _keyed_by_layer(value, depth):
            kept = {layers.index(int(key)): each for key, each in value.items() if int(key) in layers}
            settings[name] = {
                layer: {key: _size(key, each) for key, each in said.items()} for layer, said in kept.items()
            }
        elif isinstance(value, int) and not isinstance(value, bool):
            settings[name] = len(layers) if re.fullmatch(LAYERS, name) else _size(name, value)
        else:
            settings[name] = copy.deepcopy(value)
    if "kv_lora_rank" in settings and settings.get("num_key_value_heads"):
        settings["num_key_value_heads"] = settings.get("num_attention_heads")  # latent attention has no fewer
    return settings


def _one_of_each_kind(settings: Mapping[str, Any], depth: int) -> list[int]:
    """The first layer of each kind, at least two layers; a kind is what all settings per layer say of it."""
    lists = [value for value in settings.values() if isinstance(value, (list, tuple)) and len(value) == depth]
    keyed = [value for value in settings.values() if isinstance(value, Mapping) and _keyed_by_layer(value, depth)]
    kinds: dict[str, int] = {}
    for index in range(depth):
        said = [value[index] for value in lists] + [value.get(index, value.get(str(index))) for value in keyed]
        kinds.setdefault(repr([each for each in said if not isinstance(each, int) or isinstance(each, bool)]), index)
    chosen = sorted(kinds.values())
    others = [index for index in range(depth) if index not in chosen]
    return sorted([*chosen, *others[: max(0, 2 - len(chosen))]])


def _keyed_by_layer(value: Mapping[Any, Any], depth: int) -> bool:
    named = all(str(key).isdigit() and int(key) < depth for key in value)
    return bool(value) and named and all(isinstance(each, Mapping) for each in value.values())


def _sizes(said: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _size(name, value) if type(value) is int else value for name, value in said.items()}


def _size(name: str, value: int) -> int:
    if name.endswith("token_id"):
        return min(value, VOCABULARY - 1)
    return next((min(size, value) for pattern, size in SIZES if re.fullmatch(pattern, name) and value > 0), value)


def small_model(config: Any, seed: int = 0) -> nn.Module:
    """The causal language model in float32 with random weights that bfloat16 holds, no vector left at ones or zeros."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config._experts_implementation = "eager"  # the others have no float64
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.1 * noise)
            elif float(parameter.std()) == 0.0:
                parameter.copy_(0.02 * noise)
            parameter.copy_(parameter.to(torch.bfloat16))
    return model
