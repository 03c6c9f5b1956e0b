"""The distribution of a channel scale s in the numbers that write-ups about AWQ print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from awqkit.numerics.histogram import counts_at


class ScaleShape(NamedTuple):
    """See `scale_summary`."""

    mean: float
    min: float
    max: float
    std: float
    max_over_mean: float
    share_above_5x: float
    share_above_2x: float
    share_below_half: float
    log2_counts: tuple[int, ...]


def scale_summary(channel_scale: Tensor, log2_points: Sequence[float]) -> ScaleShape:
    """Mean m = Σ s_j / n, extremes, std = √(Σ (s_j − m)² / n), max / m, and shares of channels by their ratio to m.

    channel_scale: s `[channels]` > 0, at least one. Computed in float64 on the CPU, where every figure is read.
    share_above_5x, share_above_2x, share_below_half: #{s_j > 5 m} / n, #{s_j > 2 m} / n, #{s_j < m / 2} / n.
    log2_counts: channels by the point of `log2_points` that is nearest to log2 s_j, see `counts_at`.
    """
    scale = channel_scale.flatten().to("cpu", torch.float64)
    mean, (least, largest) = scale.mean(), scale.aminmax()
    parts = torch.stack([scale > 5 * mean, scale > 2 * mean, scale < mean / 2]).sum(dim=1)
    figures = torch.stack([mean, least, largest, scale.std(correction=0), largest / mean]).tolist()
    shares = (count / len(scale) for count in parts.tolist())
    return ScaleShape(*figures, *shares, log2_counts=counts_at(scale.log2(), log2_points))
