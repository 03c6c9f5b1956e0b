"""x · Wᵀ over 8-bit integers, exact on any device: products of floats that are whole numbers small enough.

    |Σ_j x_j w_j| ≤ 128 · 128 · columns < 2^24 for at most 1023 columns, which float32 holds without rounding

So the inputs are cut into pieces of that many columns, and the pieces are added up in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_EXACT_COLUMNS = 1023


def int8_matmul(inputs: Tensor, weight: Tensor) -> Tensor:
    """The exact product, float64 `[..., out]`. inputs: float32 whole numbers in −128 … 127, `[..., in]`; weight: int8
    `[out, in]`.
    """
    pieces = zip(inputs.split(_EXACT_COLUMNS, dim=-1), weight.split(_EXACT_COLUMNS, dim=-1), strict=True)
    shape = (*inputs.shape[:-1], weight.shape[0])
    total = torch.zeros(shape, dtype=torch.float64, device=inputs.device)
    for part, rows in pieces:
        total += F.linear(part, rows.to(torch.float32))
    return total
