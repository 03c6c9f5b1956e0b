"""Scoring a model on windows of text, with or without a reference beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from awqkit.evaluation.perplexity import perplexity, token_losses
from awqkit.numerics.divergence import same_top1, token_kl

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


class _Tally:
    """Sums over predicted tokens."""

    def __init__(self) -> None:
        self._loss, self._kl, self._agreed, self._tokens = 0.0, 0.0, 0, 0

    def add(self, logits: Tensor, targets: Tensor, expected: Tensor | None) -> None:
        """One batch. expected: the reference's logits, for every batch or for none."""
        self._loss += float(token_losses(logits, targets).double().sum())
        self._tokens += targets.numel()
        if expected is not None:
            self._kl += float(token_kl(expected, logits).double().sum())
            self._agreed += int(same_top1(expected, logits).sum())

    def result(self, num_windows: int, *, has_reference: bool) -> Evaluation:
        """What the sums say."""
        kl, share = (self._kl / self._tokens, self._agreed / self._tokens) if has_reference else (None, None)
        return Evaluation(perplexity(self._loss, self._tokens), kl, share, self._tokens, num_windows)


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
    first, tally = max(num_start_tokens - 1, 0), _Tally()
    with torch.inference_mode():
        for part in _parts(windows, int(model.config.get_text_config().vocab_size), device):
            batch = windows[part].to(device)
            logits = model(batch, use_cache=False).logits[:, first:-1]
            expected = None if reference is None else reference(batch, use_cache=False).logits[:, first:-1]
            tally.add(logits, batch[:, first + 1 :], expected)
            progress(part.stop)
    return tally.result(len(windows), has_reference=reference is not None)


StatesOf = Callable[[slice], Tensor]  # windows of a text -> `[windows, tokens, width]`, the last block's output


def evaluate_states(
    logits_of: Callable[[Tensor, Tensor], Tensor],
    windows: Tensor,
    num_start_tokens: int,
    vocabulary: int,
    original: StatesOf,
    others: Sequence[StatesOf],
    device: torch.device,
    progress: Callable[[int], None],
) -> tuple[Evaluation, ...]:
    """What `evaluate_windows` says of the original and of each other, with the original as their reference.

    logits_of: (ids, states) -> logits, the same for all of them.
    """
    first, tallies = max(num_start_tokens - 1, 0), [_Tally() for _ in range(1 + len(others))]
    with torch.inference_mode():
        for part in _parts(windows, vocabulary, device):
            batch = windows[part].to(device)
            targets = batch[:, first + 1 :]
            expected = logits_of(batch, original(part))[:, first:-1]
            tallies[0].add(expected, targets, None)
            for tally, states in zip(tallies[1:], others, strict=True):
                tally.add(logits_of(batch, states(part))[:, first:-1], targets, expected)
            progress(part.stop)
    return tuple(tally.result(len(windows), has_reference=tally is not tallies[0]) for tally in tallies)


def _parts(windows: Tensor, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Batches whose logits fit."""
    limit = _LOGIT_BYTES["cuda" if device.type == "cuda" else "cpu"]
    step = max(1, limit // (4 * vocabulary * windows.shape[1]))
    for start in range(0, len(windows), step):
        yield slice(start, min(start + step, len(windows)))
