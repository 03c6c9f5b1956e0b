"""Sums of outer products over tokens: total += leftᵀ · right, and the upper part of total += leftᵀ · right alone.

A GPU rounds the tokens to bfloat16, which is what a served model computes with, and sums in float32: twice as fast as
TF32, and an entry of a gram over n tokens is off by 2⁻⁹/√n of its size, far less than tokens vary. A CPU uses float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TILE = {"cpu": 256, "cuda": 2048}  # columns a step


def add_gram_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ · right to `total` `[in, in]` float32 on and above the diagonal; tiles below it stay as they are.

    left, right: `[tokens, in]` of any float dtype, whose product is symmetric.
    """
    left, right = _factors(total, left, right)
    step = _tile(total)
    for start in range(0, total.shape[0], step):
        _add_(total[start : start + step, start:], left[:, start : start + step], right[:, start:])


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ · right to `total` `[in, out]` float32; left: `[tokens, in]`, right: `[tokens, out]`."""
    left, right = _factors(total, left, right)
    step = _tile(total) if total.is_cuda else total.shape[0]
    for start in range(0, total.shape[0], step):
        _add_(total[start : start + step], left[:, start : start + step], right)


def _tile(total: Tensor) -> int:
    return _TILE["cuda" if total.is_cuda else "cpu"]


def _factors(total: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.bfloat16 if total.is_cuda else torch.float32
    first = left.to(dtype)
    return first, first if right is left else right.to(dtype)


def _add_(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.is_cuda:
        total.add_(torch.mm(left.t(), right, out_dtype=torch.float32))
    else:
        total.addmm_(left.t(), right)
