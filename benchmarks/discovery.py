"""Seconds to find the folds of a block of an 8B model and to prove them, on the CPU. Random weights, no download.

python benchmarks/discovery.py
"""

from __future__ import annotations

import argparse
import time

import torch
from bench import environment, save
from torch import Tensor
from transformers import LlamaConfig

from awqkit.model.folds import discover, prove
from awqkit.model.skeleton import Skeleton
from awqkit.pipeline.plan import make_probe

CONFIG = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    num_hidden_layers=1,
    vocab_size=1024,
)


class RandomWeights:
    """A checkpoint of random tensors in bfloat16, made when they are read."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self.names = tuple(shapes)

    def read(self, name: str) -> Tensor:
        """N(0, 1/in) for a matrix, values around 0.5 for a vector."""
        shape = self._shapes[name]
        if len(shape) == 1:
            return (0.5 + 0.1 * torch.randn(shape)).to(torch.bfloat16)
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, shape[1] ** -0.5)


def main() -> None:
    """Time discovery and the proofs and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="discovery-cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    hidden, inner, kv = CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.num_key_value_heads * CONFIG.head_dim
    base = "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": (CONFIG.vocab_size, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (CONFIG.vocab_size, hidden),
        f"{base}.input_layernorm.weight": (hidden,),
        f"{base}.post_attention_layernorm.weight": (hidden,),
        f"{base}.self_attn.q_proj.weight": (hidden, hidden),
        f"{base}.self_attn.k_proj.weight": (kv, hidden),
        f"{base}.self_attn.v_proj.weight": (kv, hidden),
        f"{base}.self_attn.o_proj.weight": (hidden, hidden),
        f"{base}.mlp.gate_proj.weight": (inner, hidden),
        f"{base}.mlp.up_proj.weight": (inner, hidden),
        f"{base}.mlp.down_proj.weight": (hidden, inner),
    }
    device = torch.device("cpu")
    skeleton = Skeleton(CONFIG, RandomWeights(shapes))
    probe = make_probe(skeleton, device)
    block = skeleton.load_block(0, device)
    run = probe.runner(block, 0)
    with torch.no_grad():
        began = time.monotonic()
        run()
        forward = time.monotonic() - began
        began = time.monotonic()
        structure = discover(block, run, probe.hidden)
        discovery = time.monotonic() - began
        began = time.monotonic()
        errors = {fold.label: prove(block, run, probe.hidden, structure, (fold,)) for fold in structure.folds}
        proofs = time.monotonic() - began
    print(f"one forward {forward:.2f} s, discovery {discovery:.2f} s, {len(errors)} proofs {proofs:.2f} s: {errors}")
    found = {"forward_seconds": forward, "discovery_seconds": discovery, "proof_seconds": proofs, "folds": errors}
    save(args.name, {"environment": environment(device), "shape": CONFIG.to_dict() | {"tokens": 16}, **found})


if __name__ == "__main__":
    main()
