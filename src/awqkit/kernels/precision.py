"""In which precision a GPU multiplies float32 matrices.

Tensor cores take TF32: 10 bits of mantissa in, float32 sums out. What a bfloat16 checkpoint computes with has fewer, so
forward passes, grams and the products of searches lose nothing by it (docs/log.md); factorisations, solutions of
equations and proofs do. A CPU multiplies float32 either way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tensor_cores(device: torch.device) -> Iterator[None]:
    """Inside, float32 products on a GPU are in TF32."""
    with _precision("high" if device.type == "cuda" else torch.get_float32_matmul_precision()):
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, float32 products are in float32 everywhere."""
    with _precision("highest"):
        yield


@contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
