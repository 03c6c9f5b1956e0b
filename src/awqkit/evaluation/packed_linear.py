"""A linear that holds its weight in 2 to 8 bits."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awqkit.evaluation.joined_products import JoinedProducts
from awqkit.kernels.int4_chunks import PackedChunks, dequantize_chunks, pack_chunks, unpack_codes
from awqkit.kernels.int4_matmul import CHUNKS, TILES, dequantize_matmul, int4_kernel, pack_for_kernel, tiles_matmul
from awqkit.numerics.grid import Grid, QuantizedWeight, dequantize

_PARTS = ("words", "scale", "zero")


class PackedLinear(nn.Module):
    """y = x · Wᵀ + bias, W on a grid: two codes a byte up to 4 bits, one above, or in the layout of an int4 kernel.

    A kernel is used for 4 bits where one takes dtype and shape (`kernels.int4_matmul`), everything else is dequantized.
    kernel: CHUNKS or TILES in the place of the one that would be chosen.
    """

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, *, kernel: str | None = None
    ) -> None:
        super().__init__()
        grid, self.dtype = weight.grid, dtype
        self.out_features, self.in_features = weight.codes.shape
        self.bits, self.group_size, self.symmetric = grid.bits, grid.group_size, grid.symmetric
        if grid.bits == 4 and kernel is None:
            kernel = int4_kernel(weight.codes.device, dtype, *weight.codes.shape, grid.group_size)
        self.kernel = kernel
        self.joined: JoinedProducts | None = None
        self.reader = 0
        if kernel == CHUNKS:
            chunks = pack_chunks(weight.codes, grid.group_scale, grid.group_zero, grid.group_size)
            self.register_buffer("words", chunks.words)
            self.register_buffer("scale", chunks.scale)
            self.register_buffer("zero", chunks.zero)
        elif kernel == TILES:
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
        if self.kernel == CHUNKS:
            return dequantize_chunks(self.words, self.scale, self.zero, self.dtype)
        if self.kernel is None:
            return dequantize(self._codes(), self.quantized_weight().grid).to(self.dtype)
        identity = torch.eye(self.in_features, dtype=self.dtype, device=self.layout.device)
        return tiles_matmul(identity, self.layout, self.offsets, self.group_size).t()

    @property
    def uses_kernel(self) -> bool:
        """Whether products go through an int4 kernel."""
        return self.kernel is not None

    def quantized_weight(self) -> QuantizedWeight:
        """Codes and grid, exact; not where torch's kernel is used, whose layout is opaque."""
        if self.kernel == CHUNKS:
            codes, scale, zero = unpack_codes(self.words), self.scale, self.zero
        else:
            codes, scale, zero = self._codes(), self.group_scale, self.group_zero
        return QuantizedWeight(codes, Grid(self.bits, self.group_size, self.symmetric, scale.float(), zero.float()))

    @property
    def chunks(self) -> PackedChunks:
        """The weight in the layout of the kernel CHUNKS."""
        return PackedChunks(self.words, self.scale, self.zero)

    def join(self, joined: JoinedProducts, reader: int) -> None:
        """Take products from `joined` where it has them; the weight becomes a view of what `joined` holds."""
        for name, rows in zip(_PARTS, joined.rows_of(reader), strict=True):
            self._buffers[name] = rows
        self.joined, self.reader = joined, reader

    def __setattr__(self, name: str, value: object) -> None:
        if name in _PARTS:
            self._part()
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        before = [self._buffers.get(name) for name in _PARTS]
        super()._apply(fn, recurse)
        if any(self._buffers.get(name) is not held for name, held in zip(_PARTS, before, strict=True)):
            self._part()
        return self

    def _part(self) -> None:
        """The weight is another one, or elsewhere: no product is joined with this one any more."""
        if self.joined is not None:
            self.joined.end()
            self.joined = None

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., in]` -> `[..., out]` in the dtype of x."""
        if self.kernel is None:
            return dequantize_matmul(x, self._codes(), self.group_scale, self.group_zero, self.group_size, self.bias)
        if self.kernel == CHUNKS:
            if x.requires_grad and torch.is_grad_enabled():  # the kernel has no gradient, the weight needs none
                return F.linear(x, self.weight.to(x.dtype), self.bias)
            product = None if self.joined is None else self.joined.product(x, self.reader)
            if product is None:
                product = torch.ops.awqkit.int4_chunks_matmul(x, self.words, self.scale, self.zero)
        else:
            product = tiles_matmul(x, self.layout, self.offsets, self.group_size)
        return product if self.bias is None else product + self.bias

    def extra_repr(self) -> str:
        """Shape and grid, for `print(model)`."""
        how = f"int4 kernel ({self.kernel})" if self.uses_kernel else "dequantized"
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}, {how}"

    def _codes(self) -> Tensor:
        if not self.two_a_byte:
            return self.codes
        return torch.stack([self.codes >> 4, self.codes & 15], dim=-1).reshape(self.out_features, self.in_features)
