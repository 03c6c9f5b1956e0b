"""Perplexity over non-overlapping windows, as the GPTQ and AWQ papers measure it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """−log p(target), nats, `[...]` float32; logits `[..., vocabulary]` of any float dtype, targets `[...]` int64."""
    flat = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1), reduction="none")
    return flat.reshape(targets.shape)


def perplexity(total_loss: float, num_tokens: int) -> float:
    """exp of the mean loss per predicted token."""
    return float(torch.tensor(total_loss / max(num_tokens, 1), dtype=torch.float64).exp())
