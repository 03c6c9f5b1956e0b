"""Rows of text that a model writes itself: what it has learned from, as far as it can still tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from awqkit.model.transformers_bridge import sample_tokens

_ROWS_AT_ONCE = 128  # a step over many rows takes about as long as one over few


def generate_rows(
    model: nn.Module,
    vocabulary_size: int,
    *,
    num_rows: int,
    seq_len: int,
    seed: int,
    start_tokens: Sequence[int] = (),
    step: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Token ids `[num_rows, seq_len]` int64 on the CPU, drawn from the model at temperature 1, nothing left out.

    model: a causal language model of transformers. Each row is the start tokens, one token drawn from the whole
    vocabulary, which is what makes rows differ in language and subject, and what the model goes on with; an end of text
    ends nothing. seed: of both draws. step(done, total): called after each token of a batch of rows.

    Training on what the model itself writes is the data-free calibration of LLM-QAT (Liu 2023, section 3.1) and of
    self-calibration (Williams 2025, section 3).
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(vocabulary_size, (num_rows, 1), generator=generator)
    begun = torch.cat([torch.tensor([*start_tokens], dtype=torch.int64).expand(num_rows, -1), first], dim=1)
    missing = seq_len - begun.shape[1]
    if missing <= 0:
        return begun[:, :seq_len]
    found: list[Tensor] = []
    at_once, done, total = _ROWS_AT_ONCE, 0, num_rows
    while done < num_rows:
        part = begun[done : done + at_once]

        def told(tokens: int, done: int = done, size: int = len(part)) -> None:
            step(done * missing + tokens * size, total * missing)

        try:
            found.append(sample_tokens(model, part.to(device), missing, seed + done, told).cpu())
        except torch.OutOfMemoryError:
            if at_once == 1:
                raise
            at_once = max(1, at_once // 2)
            continue
        done += len(part)
    return torch.cat(found)
