"""A linear with weights and inputs in 8 bits (W8A8), as servers compute it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from awqkit.kernels.int8_matmul import int8_matmul
from awqkit.numerics.activations import TOP
from awqkit.numerics.grid import Grid, QuantizedWeight

_MIDDLE = 128


class Int8Linear(nn.Module):
    """y_t = (round(x_t / Δ_t) · Qᵀ) · Δ_t · Δ + bias, with Δ_t = max |x_t| / 127 for token t and Q the signed codes.

    The product of integers is exact. weight: 8 bits, symmetric, one group a row; ValueError for another grid.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        grid = weight.grid
        if (grid.bits, grid.group_size, grid.symmetric) != (8, self.in_features, True):
            raise ValueError(
                f"a grid of {grid.bits} bits and groups of {grid.group_size}, expected 8 bits and one a row"
            )
        self.register_buffer("codes", (weight.codes.to(torch.int16) - _MIDDLE).to(torch.int8))
        self.register_buffer("group_scale", grid.group_scale)
        self.register_buffer("bias", None if bias is None else bias.to(dtype))

    def quantized_weight(self) -> QuantizedWeight:
        """Codes and grid, exact."""
        zero = torch.full_like(self.group_scale, float(_MIDDLE))
        codes = (self.codes.to(torch.int16) + _MIDDLE).to(torch.uint8)
        return QuantizedWeight(codes, Grid(8, self.in_features, True, self.group_scale, zero))

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., in]` -> `[..., out]` in the dtype of x."""
        step = x.float().abs().amax(dim=-1, keepdim=True).div(TOP).clamp_(min=torch.finfo(torch.float32).tiny)
        rounded = (x.float() / step).round_()
        product = int8_matmul(rounded, self.codes) * step * self.group_scale.squeeze(-1)
        product = product.to(x.dtype)
        return product if self.bias is None else product + self.bias

    def extra_repr(self) -> str:
        """Shape and grid, for `print(model)`."""
        return f"{self.in_features}, {self.out_features}, int8 weights and inputs"
