"""Counts of values at fixed points: histograms of many searches that can be added up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def counted_at(values: Tensor, points: Sequence[float]) -> Tensor:
    """How many of `values` (any shape, finite) lie nearest to each of `points`, `[points]` int64 on their device.

    points: evenly spaced, rising, at least two. What lies outside counts at the first or last point, and a value in
    the middle of two at one of them.
    """
    step = (points[-1] - points[0]) / (len(points) - 1)
    index = ((values.flatten().to(torch.float64) - points[0]) / step).round()
    index = index.clamp(0, len(points) - 1).to(torch.int64)
    counts = torch.zeros(len(points), dtype=torch.int64, device=values.device)
    return counts.scatter_add_(0, index, torch.ones_like(index))  # bincount waits for the largest value first


def counts_at(values: Tensor, points: Sequence[float]) -> tuple[int, ...]:
    """`counted_at` as numbers.

    >>> counts_at(torch.tensor([0.0, 0.4, 0.6, 7.0]), (0.0, 0.5, 1.0))
    (1, 2, 1)
    """
    return tuple(counted_at(values, points).tolist())
