"""Activation saliency: how much of a linear's output error a few input channels carry.

AWQ starts from the claim that 1 % of the channels, those with the largest activations, matter most (Lin 2023, table 1:
keeping them in full precision removes most of the loss). Here it is measured for one linear:

    share(S) = 1 − tr(E' H E'ᵀ) / tr(E H Eᵀ)       E' is E with the columns of S set to zero

which is the part of the output error that is gone when the channels S keep full precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from awqkit.numerics.output_error import moment_among, moment_diagonal, pushed

# A share needs no more rows than this; all rows of a large linear would cost as much as judging a candidate.
_MAX_ROWS = 512


def saliency_shares(error: Tensor, moment: Tensor, channel_shares: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """(share of channels, share of the output error that they carry) for each of `channel_shares`: `saliency_sums`."""
    return shares_of_sums(saliency_sums(error, moment, channel_shares).tolist(), channel_shares)


def shares_of_sums(sums: Sequence[float], channel_shares: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Of `saliency_sums` as numbers. A share can be negative, where errors cancel; it is 0 where there is no error."""
    total, *removed = sums
    if total <= 0.0:
        return tuple((share, 0.0) for share in channel_shares)
    return tuple((share, each / total) for share, each in zip(channel_shares, removed, strict=True))


def saliency_sums(error: Tensor, moment: Tensor, channel_shares: Sequence[float]) -> Tensor:
    """tr(E H Eᵀ), and what of it is gone without the errors of S, for each of `channel_shares`, float64.

    error: E = Ŵ − W float32 `[out, in]`; where it has many rows, some hundred evenly spaced ones are looked at.
    moment: H as `output_error` takes it, float32. S are the ⌈share · in⌉ channels with the largest H_jj = E[x_j²].
    """
    rows = error[:: math.ceil(error.shape[0] / _MAX_ROWS)]
    felt = pushed(rows, moment)
    order = moment_diagonal(moment).argsort(descending=True, stable=True)
    counts = [math.ceil(share * len(order)) for share in channel_shares]
    salient = order[: max(counts, default=0)]
    alone = rows[:, salient]
    # tr(E H Eᵀ) − tr(E' H E'ᵀ) = 2 tr(E_S (E H)_Sᵀ) − tr(E_S H_SS E_Sᵀ), E_S the columns of S, for each S at once:
    # the first so many salient channels
    once = (felt[:, salient] * alone).sum(dim=0).double().cumsum(0)
    twice = ((alone.t() @ alone) * moment_among(moment, salient)).double().cumsum(0).cumsum(1).diagonal()
    removed = 2 * once - twice
    return torch.stack([(felt * rows).sum().double(), *(removed[count - 1] for count in counts)])
