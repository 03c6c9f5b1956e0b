"""Counts of values at fixed points: histograms of many searches that can be added up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def counts_at(values: Tensor, points: Sequence[float]) -> tuple[int, ...]:
    """How many of `values` (any shape, finite) lie nearest to each of `points`.

    points: evenly spaced, rising, at least two. What lies outside counts at the first or last point, and a value in
    the middle of two at one of them.

    >>> counts_at(torch.tensor([0.0, 0.4, 0.6, 7.0]), (0.0, 0.5, 1.0))
    (1, 2, 1)
    """
    step = (points[-1] - points[0]) / (len(points) - 1)
    index = ((values.flatten().to(torch.float64) - points[0]) / step).round()
    index = index.clamp(0, len(points) - 1).to(torch.int64)
    return tuple(torch.bincount(index, minlength=len(points)).tolist())
