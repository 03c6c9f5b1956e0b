"""In which precision a GPU multiplies float32 matrices.

Tensor cores take TF32: 10 bits of mantissa in, float32 sums out. What a bfloat16 checkpoint computes with has fewer, so
forward passes, grams and the products of searches lose nothing by it (docs/log.md); factorisations, solutions of
equations and proofs do. A CPU multiplies float32 either way.
"""

from __future__ import annotations

import torch


class _Precision:
    """Inside, `torch.set_float32_matmul_precision` is `name`, or what it was where that is None."""

    def __init__(self, name: str | None) -> None:
        self._name = name

    def __enter__(self) -> None:
        self._before = torch.get_float32_matmul_precision()
        if self._name is not None:
            torch.set_float32_matmul_precision(self._name)

    def __exit__(self, *raised: object) -> None:
        torch.set_float32_matmul_precision(self._before)


def tensor_cores(device: torch.device) -> _Precision:
    """A context in which float32 products on a GPU are in TF32."""
    return _Precision("high" if device.type == "cuda" else None)


def full_precision() -> _Precision:
    """A context in which float32 products are in float32 everywhere."""
    return _Precision("highest")
