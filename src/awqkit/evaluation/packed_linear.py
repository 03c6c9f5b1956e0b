"""A linear that holds its weight in 2 to 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from awqkit.kernels.int4_matmul import PackedInt4, dequantize_matmul, int4_matmul, kernel_takes, pack_for_kernel
from awqkit.numerics.grid import Grid, QuantizedWeight, dequantize


class PackedLinear(nn.Module):
    """y = x · Wᵀ + bias, W on a grid: two codes a byte up to 4 bits, one above, or the int4 kernel's own layout.

    The kernel is used for 4 bits in bfloat16 where it takes the shape (`kernels.int4_matmul`), everything else is
    dequantized.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        grid, self.dtype = weight.grid, dtype
        self.out_features, self.in_features = weight.codes.shape
        self.bits, self.group_size, self.symmetric = grid.bits, grid.group_size, grid.symmetric
        shape = (self.out_features, self.in_features)
        if grid.bits == 4 and kernel_takes(weight.codes.device, dtype, *shape, grid.group_size):
            packed = pack_for_kernel(weight.codes, grid.group_scale, grid.group_zero, grid.group_size)
            self.register_buffer("layout", packed.layout)
            self.register_buffer("offsets", packed.offsets)
        else:
            self.two_a_byte = grid.bits <= 4 and self.in_features % 2 == 0
            codes = weight.codes[:, ::2] << 4 | weight.codes[:, 1::2] if self.two_a_byte else weight.codes.clone()
            self.register_buffer("codes", codes)
            self.register_buffer("group_scale", grid.group_scale)
            self.register_buffer("group_zero", grid.group_zero.to(torch.uint8))
        self.register_buffer("bias", None if bias is None else bias.to(dtype))

    @property
    def weight(self) -> Tensor:
        """What the codes mean, `[out, in]`, made anew: some models compute with a linear's weight themselves."""
        if not self.uses_kernel:
            return dequantize(self._codes(), self.quantized_weight().grid).to(self.dtype)
        identity = torch.eye(self.in_features, dtype=self.dtype, device=self.layout.device)
        return int4_matmul(identity, PackedInt4(self.layout, self.offsets, self.group_size)).t()

    @property
    def uses_kernel(self) -> bool:
        """Whether products go through torch's int4 kernel."""
        return hasattr(self, "layout")

    def quantized_weight(self) -> QuantizedWeight:
        """Codes and grid, exact; only where no kernel is used, whose layout is opaque."""
        grid = Grid(self.bits, self.group_size, self.symmetric, self.group_scale.float(), self.group_zero.float())
        return QuantizedWeight(self._codes(), grid)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., in]` -> `[..., out]` in the dtype of x."""
        if not self.uses_kernel:
            return dequantize_matmul(x, self._codes(), self.group_scale, self.group_zero, self.group_size, self.bias)
        product = int4_matmul(x, PackedInt4(self.layout, self.offsets, self.group_size))
        return product if self.bias is None else product + self.bias

    def extra_repr(self) -> str:
        """Shape and grid, for `print(model)`."""
        how = "int4 kernel" if self.uses_kernel else "dequantized"
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}, {how}"

    def _codes(self) -> Tensor:
        if not self.two_a_byte:
            return self.codes
        return torch.stack([self.codes >> 4, self.codes & 15], dim=-1).reshape(self.out_features, self.in_features)
