"""Tokens drawn from logits: against a plain float64 loop, and not swayed by the order of a sum."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from awqkit.numerics.draw import drawn_tokens


def plain(logits: Tensor, chance: Tensor) -> list[int]:
    tokens = []
    for row, wanted in zip(logits.double().tolist(), chance.double().flatten().tolist(), strict=True):
        weights = [math.exp(value - max(row)) for value in row]
        total, reached = sum(weights), 0.0
        for token, weight in enumerate(weights):
            reached += weight
            if reached > wanted * total:
                tokens.append(token)
                break
    return tokens


def test_tokens_are_those_of_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(400, 30, generator=generator)
    chance = torch.rand(400, 1, generator=generator)
    assert drawn_tokens(logits, chance).flatten().tolist() == plain(logits, chance)


@pytest.mark.parametrize("chance", [0.0, 0.5, 1.0 - 2.0**-24])
def test_a_token_without_probability_is_never_drawn(chance: float) -> None:
    logits = torch.full((1, 5), -torch.inf)
    logits[0, 2] = 1.0
    assert drawn_tokens(logits, torch.tensor([[chance]])).item() == 2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device here"))])  # fmt: skip
def test_a_large_vocabulary_gives_the_tokens_that_float64_gives_from_either_end(device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2000, 50_000, generator=generator)
    chance = torch.rand(2000, 1, generator=generator)
    probability = logits.softmax(dim=-1).double()
    below = probability.sum(dim=-1, keepdim=True) - probability.flip(-1).cumsum(-1).flip(-1)  # summed from the end
    expected = torch.searchsorted(below, chance * probability.sum(dim=-1, keepdim=True), right=True) - 1
    found = drawn_tokens(logits.to(device), chance.to(device)).cpu()
    assert torch.equal(found, expected)
