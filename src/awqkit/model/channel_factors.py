"""Factors that tell channels apart, and reading them off a tensor that carries them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FACTOR_TOLERANCE = 2e-5  # how far a measured ratio may be from a factor; factors of 14,336 channels lie 7e-5 apart
CONSTANT_TOLERANCE = 1e-4  # how much a channel's ratio may vary over the tokens


def distinct_factors(num_channels: int, device: torch.device) -> Tensor:
    """Factors in [0.5, 0.9] and [1.2, 2.2], all different and none near 1, in a fixed random order."""
    half = num_channels // 2 + 1
    low = torch.logspace(-1.0, -0.152, half, base=2.0)
    high = torch.logspace(0.263, 1.138, half, base=2.0)
    order = torch.randperm(num_channels, generator=torch.Generator().manual_seed(num_channels))
    return torch.cat([low, high])[:num_channels][order].to(device)


def with_one(factor: Tensor) -> Tensor:
    """The factors with a 1 behind them, which is what a `channel_of` of −1 finds."""
    return torch.cat([factor, torch.ones_like(factor[:1])])


def read_factors(pairs: Sequence[tuple[Tensor, Tensor]], factor: Tensor) -> list[Tensor | None]:
    """For each pair (plain, scaled) of `[..., in]`: `channel_of` `[in]` where every channel of `scaled` is `plain`
    times 1 or times one factor, else None.

    −1 stands for a channel that did not change, or that is zero throughout. Pairs of as many tokens are looked at side
    by side, which takes as many operators as one of them; the same pair gets the same answer.
    """
    found: dict[tuple[int, int], Tensor | None] = {}
    by_tokens: dict[int, dict[tuple[int, int], tuple[Tensor, Tensor]]] = {}
    for plain, scaled in pairs:
        rows = plain.reshape(-1, plain.shape[-1]), scaled.reshape(-1, scaled.shape[-1])
        by_tokens.setdefault(len(rows[0]), {})[id(plain), id(scaled)] = rows
    for alike in by_tokens.values():
        found |= zip(alike, _read_side_by_side(list(alike.values()), factor), strict=True)
    return [found[id(plain), id(scaled)] for plain, scaled in pairs]


def _read_side_by_side(pairs: Sequence[tuple[Tensor, Tensor]], factor: Tensor) -> list[Tensor | None]:
    """The same of different pairs of `[tokens, in]`."""
    plain, scaled = (torch.cat(side, dim=1) for side in zip(*pairs, strict=True))
    energy = plain.square().sum(dim=0)
    ratio = torch.where(energy > 0, (plain * scaled).sum(dim=0) / energy.clamp(min=1e-30), 1.0)
    residual = (scaled - plain * ratio).square().sum(dim=0)
    varies = residual > CONSTANT_TOLERANCE**2 * energy * ratio.square().clamp(min=1e-6)
    ordered, order = factor.sort()
    right = torch.searchsorted(ordered, ratio).clamp(max=ordered.numel() - 1)
    left = (right - 1).clamp(min=0)
    nearer = torch.where((ordered[left] - ratio).abs() < (ordered[right] - ratio).abs(), left, right)
    unchanged = (ratio - 1.0).abs() <= FACTOR_TOLERANCE
    matched = ~unchanged & ((ordered[nearer] - ratio).abs() <= FACTOR_TOLERANCE * ratio.abs())
    channel_of = torch.where(matched, order[nearer], -1)
    channels = [each.shape[1] for each, _ in pairs]
    verdicts = torch.stack([varies | ~(matched | unchanged), matched]).cpu().split(channels, dim=1)
    return [
        of.clone() if bool(matches.any()) and not bool(wrong.any()) else None
        for of, (wrong, matches) in zip(channel_of.split(channels), verdicts, strict=True)
    ]
