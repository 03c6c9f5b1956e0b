"""Folds as tables of names have them: a norm, the linears that are said to read it, and w taken for what multiplies."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class MappedFold:
    """norm, readers: patterns on parameter names; every norm is divided by s, every reader's columns multiplied by it.

    adds_one: whether the fold knows that the norm multiplies by 1 + w, where it does. mended: what is right instead.
    """

    norm: str
    readers: str
    adds_one: bool = False
    mended: MappedFold | None = None


_INPUT, _POST = r"layers\.\d+\.input_layernorm\.weight", r"layers\.\d+\.post_attention_layernorm\.weight"
_QKV = r"self_attn\.[qkv]_proj\.weight"
_EXPERTS = r"mlp\.(experts\.gate_up_proj|(shared_experts?\.)?(gate|up)_proj\.weight)"
_WITH_ROUTER = rf"{_EXPERTS}|mlp\.(gate|shared_expert_gate)\.weight"
_INTO_ATTENTION = MappedFold(_INPUT, _QKV, mended=MappedFold(_INPUT, _QKV, adds_one=True))
_INTO_EXPERTS = MappedFold(_POST, _EXPERTS, mended=MappedFold(_POST, _WITH_ROUTER))
_INTO_EXPERTS_ADDING_ONE = MappedFold(_POST, _EXPERTS, adds_one=True, mended=MappedFold(_POST, _WITH_ROUTER, True))

# by model_type, what llm-compressor mapped (before a fix, or still): see docs/where-tables-fail.md
MAPPED: dict[str, MappedFold] = {
    "gemma": _INTO_ATTENTION,
    "gemma2": _INTO_ATTENTION,
    "gemma3_text": _INTO_ATTENTION,
    "ernie4_5_moe": _INTO_EXPERTS,
    "glm4_moe_lite": _INTO_EXPERTS,
    "qwen3_next": _INTO_EXPERTS_ADDING_ONE,
    "qwen3_5_moe_text": _INTO_EXPERTS_ADDING_ONE,
}


def apply_mapped(model: nn.Module, fold: MappedFold) -> tuple[int, int]:
    """Fold a random s, log-uniform in e⁻¹ … e, as the table says. Returns how many norms and readers were changed."""
    generator, norms, readers, scale = torch.Generator().manual_seed(0), 0, 0, {}
    with torch.no_grad():
        for name, value in model.named_parameters():
            if re.search(fold.norm, name):
                s = torch.exp(torch.empty(len(value), dtype=value.dtype).uniform_(-1.0, 1.0, generator=generator))
                scale[_block_of(name)] = s
                value.copy_((1.0 + value) / s - 1.0 if fold.adds_one else value / s)
                norms += 1
        for name, value in model.named_parameters():
            if re.search(fold.readers, name):
                value.mul_(scale[_block_of(name)])
                readers += 1
    return norms, readers


def _block_of(name: str) -> str:
    return re.search(r"layers\.\d+\.", name)[0]
