"""Train a small mixture of experts for `benchmarks/mixture.py`: eight experts a block, two of them for each token.

    python tools/train_mixture.py --out OUT --device cuda            some minutes on a GPU
    python tools/train_mixture.py --out OUT --device cpu --steps 400 --rows 16      about half an hour on two cores

The text, tokenizer, rows and schedule are those of `train_demo_model.py`; nothing is committed. 21 million parameters,
seven million of them for each token. The router is held to a balanced choice by transformers' own auxiliary loss.
"""

from __future__ import annotations

import train_demo_model
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import MixtralConfig, MixtralForCausalLM

BALANCE = 0.02  # of the auxiliary loss
CONFIG = {
    **train_demo_model.CONFIG,
    "intermediate_size": 512,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}


def make_model(tokenizer: Tokenizer, seed: int) -> MixtralForCausalLM:
    """The untrained model in float32."""
    train_demo_model.torch.manual_seed(seed)
    token_ids = {
        "bos_token_id": tokenizer.token_to_id(train_demo_model.BOS),
        "eos_token_id": tokenizer.token_to_id(train_demo_model.END_OF_TEXT),
    }
    return MixtralForCausalLM(MixtralConfig(**CONFIG, **token_ids))


def mean_loss(model: MixtralForCausalLM, rows: Tensor) -> Tensor:
    """Nats per predicted token of `rows` `[rows, tokens]`, in training with what an unbalanced choice costs."""
    outputs = model(rows[:, :-1], use_cache=False, output_router_logits=model.training)
    loss = cross_entropy(outputs.logits.flatten(0, 1).float(), rows[:, 1:].flatten())
    return loss + BALANCE * outputs.aux_loss if model.training else loss


def main() -> None:
    args = train_demo_model.parse_arguments(__doc__)
    train_demo_model.run(args, make_model, mean_loss, lambda layer: (layer.self_attn.o_proj, layer.mlp))


if __name__ == "__main__":
    main()
