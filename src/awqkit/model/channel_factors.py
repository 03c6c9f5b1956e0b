"""Factors that tell channels apart, and reading them off a tensor that carries them."""

from __future__ import annotations

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


def read_factors(plain: Tensor, scaled: Tensor, factor: Tensor) -> Tensor | None:
    """`channel_of` `[in]` where every channel of `scaled` is `plain` times 1 or times one factor, else None.

    −1 stands for a channel that did not change, or that is zero throughout.
    """
    plain, scaled = plain.reshape(-1, plain.shape[-1]), scaled.reshape(-1, scaled.shape[-1])
    energy = plain.square().sum(dim=0)
    alive = energy > 0
    ratio = torch.where(alive, (plain * scaled).sum(dim=0) / energy.clamp(min=1e-30), torch.ones_like(energy))
    residual = (scaled - plain * ratio).square().sum(dim=0)
    if bool((residual > CONSTANT_TOLERANCE**2 * energy * ratio.square().clamp(min=1e-6)).any()):
        return None
    ordered, order = factor.sort()
    right = torch.searchsorted(ordered, ratio).clamp(max=ordered.numel() - 1)
    left = (right - 1).clamp(min=0)
    nearer = torch.where((ordered[left] - ratio).abs() < (ordered[right] - ratio).abs(), left, right)
    unchanged = (ratio - 1.0).abs() <= FACTOR_TOLERANCE
    matched = ~unchanged & ((ordered[nearer] - ratio).abs() <= FACTOR_TOLERANCE * ratio.abs())
    if not bool((matched | unchanged).all()) or not bool(matched.any()):
        return None
    return torch.where(matched, order[nearer], torch.full_like(order[nearer], -1))
