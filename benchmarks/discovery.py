"""Seconds to find the folds of a large block and to prove them, on the CPU. Random weights, no download.

python benchmarks/discovery.py                     blocks of an 8B and of a 70B model, and one with 128 experts
python benchmarks/discovery.py --blocks 8B
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from bench import environment, save
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from awqkit.model.folds import discover
from awqkit.model.proof import proof_errors, proved_together
from awqkit.model.random_weights import RandomWeights
from awqkit.model.skeleton import Skeleton
from awqkit.pipeline.plan import make_probe

SMALL = {"num_hidden_layers": 1, "vocab_size": 1024}
BLOCKS: dict[str, PretrainedConfig] = {
    "8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, **SMALL
    ),
    "70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8, **SMALL
    ),
    "128 experts": Qwen3MoeConfig(
        hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, head_dim=128,
        num_attention_heads=32, num_key_value_heads=4, **SMALL,
    ),
}  # fmt: skip


def main() -> None:
    """Time discovery and the proofs and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="+", default=list(BLOCKS), choices=list(BLOCKS))
    parser.add_argument("--name", default="discovery-cpu")
    args = parser.parse_args()
    device = torch.device("cpu")
    found = {}
    for name in args.blocks:
        found[name] = timed(BLOCKS[name], device)
        print(f"{name}: {found[name]}", flush=True)
    save(args.name, {"environment": environment(device), "blocks": found})


def timed(config: PretrainedConfig, device: torch.device) -> dict[str, Any]:
    """Seconds of one forward, of discovery and of all proofs, and the proofs' largest error, for a block of a kind."""
    skeleton = Skeleton(config, RandomWeights(config))
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
        errors = [
            error
            for group in proved_together(structure)
            for error in proof_errors(block, run, probe.hidden, structure, group)
        ]
        proofs = time.monotonic() - began
    return {
        "weights": sum(value.numel() for value in block.parameters()),
        "forward_seconds": forward,
        "discovery_seconds": discovery,
        "proof_seconds": proofs,
        "linears": len(structure.linears),
        "folds": len(errors),
        "largest_proof_error": max(errors),
    }


if __name__ == "__main__":
    main()
