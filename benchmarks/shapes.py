"""Checkpoints of known shapes with random weights, for speed and memory: no download, any number of blocks.

    python benchmarks/shapes.py llama-2-7b /tmp/shape --blocks 4
    python benchmarks/shapes.py qwen3-moe /tmp/shape --blocks 2 --vocab 1024

Tensors are made and written one at a time, so that memory holds one tensor, whatever the model's size. There is no
tokenizer: runs on them get token ids. A small vocabulary keeps embeddings from being most of a model of few blocks.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from awqkit.checkpoint.header import TensorSpec
from awqkit.checkpoint.writer import CheckpointWriter, plan_layout

_LLAMA: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
_QWEN_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_act": "silu", "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip


def _shape(
    kind: Mapping[str, Any], hidden: int, inner: int, heads: int, kv_heads: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        **kind, "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": 128, "vocab_size": vocab, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, **more,
    }  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": _shape(_LLAMA, 4096, 11008, 32, 32, 32000),
    "llama-3-8b": _shape(_LLAMA, 4096, 14336, 32, 8, 128256),
    "llama-70b": _shape(_LLAMA, 8192, 28672, 64, 8, 32000),
    "qwen3-moe": _shape(
        _QWEN_MOE, 2048, 6144, 32, 4, 151936, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768
    ),
    "smollm2": _shape(_LLAMA, 576, 1536, 9, 3, 49152, head_dim=64),
    "llama-1k": _shape(_LLAMA, 1024, 2816, 8, 8, 32000),
    "llama-2k": _shape(_LLAMA, 2048, 5632, 16, 16, 32000),
    "tiny": _shape(_LLAMA, 64, 128, 4, 2, 256, head_dim=16),
    "tiny-moe": _shape(
        _QWEN_MOE, 64, 128, 4, 2, 256, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
}
BLOCKS = {
    "smollm2": 30,
    "llama-1k": 24,
    "llama-2k": 24,
    "llama-2-7b": 32,
    "llama-3-8b": 32,
    "llama-70b": 80,
    "qwen3-moe": 48,
    "tiny": 3,
    "tiny-moe": 3,
}


def write_shape(name: str, out: Path, *, blocks: int, vocab: int | None = None, seed: int = 0) -> Path:
    """Write the checkpoint in bfloat16 to the new folder `out`. vocab: instead of the shape's own vocabulary."""
    config = {**SHAPES[name], "num_hidden_layers": blocks, "dtype": "bfloat16"}
    config["vocab_size"] = vocab or config["vocab_size"]
    specs = [TensorSpec(path, torch.bfloat16, shape) for path, shape in tensors(config)]
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(seed)
    with CheckpointWriter(out, plan_layout(specs), overwrite=False) as writer:
        for spec in specs:
            writer.write(spec.name, _values(spec, generator))
        writer.write_json("config.json", config)
        writer.commit()
    return out


def tensors(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of the model that a config describes, block by block."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for index in range(config["num_hidden_layers"]):
        yield from ((f"model.layers.{index}.{path}", shape) for path, shape in _block(config))
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def _block(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "input_layernorm.weight", (hidden,)
    for part, rows in (("q", queries), ("k", keys), ("v", keys)):
        yield f"self_attn.{part}_proj.weight", (rows, hidden)
    yield "self_attn.o_proj.weight", (hidden, queries)
    yield "post_attention_layernorm.weight", (hidden,)
    if "num_experts" not in config:
        yield from _mlp("mlp", hidden, config["intermediate_size"])
        return
    yield "self_attn.q_norm.weight", (head,)
    yield "self_attn.k_norm.weight", (head,)
    yield "mlp.gate.weight", (config["num_experts"], hidden)
    for expert in range(config["num_experts"]):
        yield from _mlp(f"mlp.experts.{expert}", hidden, config["moe_intermediate_size"])


def _mlp(path: str, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{path}.gate_proj.weight", (inner, hidden)
    yield f"{path}.up_proj.weight", (inner, hidden)
    yield f"{path}.down_proj.weight", (hidden, inner)


def _values(spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    """N(0, 1 / in), so that hidden states stay of one size; norms around 1."""
    found = torch.empty(spec.shape, dtype=spec.dtype, device=generator.device)
    if len(spec.shape) == 1:
        return found.uniform_(0.5, 2.0, generator=generator).cpu()
    return found.normal_(0.0, spec.shape[1] ** -0.5, generator=generator).cpu()


def main() -> None:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", type=int, help="how many; those of the real model if left out")
    parser.add_argument("--vocab", type=int)
    args = parser.parse_args()
    write_shape(args.shape, args.out, blocks=args.blocks or BLOCKS[args.shape], vocab=args.vocab)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"written: {args.out}, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
