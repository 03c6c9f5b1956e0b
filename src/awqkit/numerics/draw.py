"""Drawing tokens from logits, the same ones on every run."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_chances(num_tokens: int, num_rows: int, seed: int) -> Tensor:
    """`[tokens, rows, 1]` float32, uniform in [0, 1), on the CPU: the same ones however they are used up."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.rand(num_rows, 1, generator=generator) for _ in range(num_tokens)])


def drawn_tokens(logits: Tensor, chance: Tensor) -> Tensor:
    """Token ids `[rows, 1]` int64: where the cumulated probabilities of `logits` `[rows, vocabulary]` pass `chance`.

    chance: `[rows, 1]`, uniform in [0, 1). Inverse transform sampling (Devroye 1986, section II.2). The sum is taken
    in float64: a GPU adds in no fixed order, and in float32 that moves a boundary between two tokens often enough to
    change one draw in some hundreds, and with it all that a model writes after it.
    """
    reached = logits.float().softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    tokens = torch.searchsorted(reached, chance.to(reached) * reached[:, -1:], right=True)
    return tokens.clamp_(max=logits.shape[-1] - 1)
