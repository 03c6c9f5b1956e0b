"""Rows of text that a model writes itself: what it has learned from, as far as it can still tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from awqkit.model.fixed_cache_decoding import decode_tokens
from awqkit.model.transformers_bridge import sample_tokens

PASSAGE = 128  # tokens: several short passages a row cover more subjects than one long one, and are written faster
_AT_ONCE = {"cpu": 256, "cuda": 1024}  # a step over many passages takes a GPU about as long as one over few
_REPLAYED_ON = ("cuda",)  # a CPU computes as long as `generate` launches, and longer with all of a cache
_STEPS_WORTH_CAPTURING = 16
_NOT_REPLAYED = "the model's own text is written without CUDA graphs, slower: {}"


def passages_at_once(device: torch.device) -> int:
    """How many passages are written at once where there is room."""
    return _AT_ONCE["cuda" if device.type == "cuda" else "cpu"]


def generate_rows(
    model: nn.Module,
    vocabulary_size: int,
    *,
    num_rows: int,
    seq_len: int,
    seed: int,
    start_tokens: Sequence[int] = (),
    step: Callable[[int, int], None] = lambda done, total: None,
    told: Callable[[str], None] = lambda text: None,
) -> Tensor:
    """Token ids `[num_rows, seq_len]` int64 on the CPU, drawn from the model at temperature 1, nothing left out.

    model: a causal language model of transformers. A row is the start tokens and passages of up to 128 tokens with
    nothing between them. A passage is one token drawn from the whole vocabulary, which is what makes them differ in
    language and subject, and what the model goes on with; an end of text ends nothing. seed: of both draws.
    step(done, total): called after each token of every passage under way. told: what is worth a line.

    What a model writes as data to adapt it with: LLM-QAT (Liu 2023, section 3.1), as calibration text: Williams 2025
    ("Self-calibration for language model quantization and pruning", section 3).
    """
    prefix = torch.tensor([*start_tokens], dtype=torch.int64)[:seq_len]
    wanted = seq_len - len(prefix)
    length = max(1, min(PASSAGE, wanted))
    per_row = -(-wanted // length)
    first = torch.randint(vocabulary_size, (num_rows * per_row, 1), generator=torch.Generator().manual_seed(seed))
    begun = torch.cat([prefix.expand(len(first), -1), first], dim=1)
    written = _continued(model, begun, length - 1, seed, step, told)[:, len(prefix) :]
    return torch.cat([prefix.expand(num_rows, -1), written.reshape(num_rows, -1)[:, :wanted]], dim=1)


def _continued(
    model: nn.Module,
    begun: Tensor,
    num_tokens: int,
    seed: int,
    step: Callable[[int, int], None],
    told: Callable[[str], None],
) -> Tensor:
    """Every passage with `num_tokens` more; fewer at once where the device has no room for so many."""
    if num_tokens == 0:
        return begun
    device = next(model.parameters()).device
    replayed = device.type in _REPLAYED_ON and num_tokens >= _STEPS_WORTH_CAPTURING
    found: list[Tensor] = []
    at_once, done = passages_at_once(device), 0
    while done < len(begun):
        part = begun[done : done + at_once]

        def advanced(tokens: int, done: int = done, size: int = len(part)) -> None:
            step(done * num_tokens + tokens * size, len(begun) * num_tokens)

        asked = (model, part.to(device), num_tokens, seed + done, advanced)
        try:
            written = decode_tokens(*asked) if replayed else sample_tokens(*asked)
        except torch.OutOfMemoryError:
            if at_once == 1:
                raise
            at_once //= 2
            continue
        if isinstance(written, str):
            told(_NOT_REPLAYED.format(written))
            replayed = False
            if device.type == "cuda":
                torch.cuda.empty_cache()  # what was captured
            continue
        found.append(written.cpu())
        done += len(part)
    return torch.cat(found)
