"""Scoring a model on windows of text, with or without a reference beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from awqkit.evaluation.divergence import same_top1, token_kl
from awqkit.evaluation.perplexity import perplexity, token_losses

_LOGIT_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}  # float32 logits of one batch


@dataclass(frozen=True, slots=True)
class Evaluation:
    """perplexity: exp(nats per predicted token). kl: nats per token, mean of KL(reference ‖ model).

    top1_agreement: share of positions where both put the same token first. tokens: predicted tokens.
    """

    perplexity: float
    kl: float | None
    top1_agreement: float | None
    tokens: int
    windows: int

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def evaluate_windows(
    model: nn.Module,
    windows: Tensor,
    num_start_tokens: int,
    reference: nn.Module | None,
    device: torch.device,
    progress: Callable[[int], None],
) -> Evaluation:
    """Score `model` on windows `[windows, tokens]` int64 that each begin with `num_start_tokens` start tokens.

    Every text token with a token before it in its window is predicted. progress gets the number of windows done.
    """
    first = max(num_start_tokens - 1, 0)
    vocabulary = int(model.config.get_text_config().vocab_size)
    limit = _LOGIT_BYTES["cuda" if device.type == "cuda" else "cpu"]
    step = max(1, limit // (4 * vocabulary * windows.shape[1]))
    loss, kl, agreed, tokens = 0.0, 0.0, 0, 0
    with torch.inference_mode():
        for start in range(0, len(windows), step):
            batch = windows[start : start + step].to(device)
            logits = model(batch, use_cache=False).logits[:, first:-1]
            targets = batch[:, first + 1 :]
            loss += float(token_losses(logits, targets).double().sum())
            tokens += targets.numel()
            if reference is not None:
                expected = reference(batch, use_cache=False).logits[:, first:-1]
                kl += float(token_kl(expected, logits).double().sum())
                agreed += int(same_top1(expected, logits).sum())
            progress(min(start + step, len(windows)))
    share = None if reference is None else agreed / tokens
    return Evaluation(perplexity(loss, tokens), None if reference is None else kl / tokens, share, tokens, len(windows))
