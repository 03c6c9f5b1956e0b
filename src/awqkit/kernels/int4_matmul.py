"""x · Wᵀ with W on a 4-bit grid: in chunks on a GPU with Triton, else torch's int4 kernel, else with W dequantized.

`int4_chunks` rounds no weight. torch's kernel computes (q − 8) · Δ + o with the offset o = (8 − z) · Δ held in the
compute dtype. In bfloat16 that rounds o by at most Δ/37, less than a dequantized bfloat16 weight is; a symmetric grid
has o = 0. The reference is exact: (q − z) · Δ in float32, then the product in the dtype of x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from awqkit.kernels.int4_chunks import chunks_take

CHUNKS, TILES = "chunks", "tiles"  # kernels: `int4_chunks`, and torch's own
_KERNEL_GROUP_SIZES = (32, 64, 128)
_CPU_ROWS, _CUDA_ROWS = 16, 8  # the kernels' tiles over output features
_CUDA_INNER_K_TILES = (8, 4, 2)  # layouts of the CUDA kernel; the widest that divides is fastest


@dataclass(frozen=True, slots=True)
class PackedInt4:
    """A 4-bit weight as the kernel reads it. layout: opaque, per device; offsets: `[groups, out, 2]` Δ and o."""

    layout: Tensor
    offsets: Tensor
    group_size: int


def int4_kernel(
    device: torch.device, dtype: torch.dtype, out_features: int, in_features: int, group_size: int
) -> str | None:
    """CHUNKS, TILES, or None where a product is best done with the dequantized weight."""
    if chunks_take(device, dtype, in_features, group_size):
        return CHUNKS
    return TILES if kernel_takes(device, dtype, out_features, in_features, group_size) else None


def kernel_takes(
    device: torch.device, dtype: torch.dtype, out_features: int, in_features: int, group_size: int
) -> bool:
    """Whether torch's int4 kernel for this device is usable and worth it.

    bfloat16 only: for float32 and float16 the CPU has just a scalar loop, several to many times slower than a
    dense product, CUDA nothing at all.
    """
    if dtype != torch.bfloat16 or group_size not in _KERNEL_GROUP_SIZES or in_features % group_size:
        return False
    if device.type == "cpu":
        return out_features % _CPU_ROWS == 0
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return capable and out_features % _CUDA_ROWS == 0 and in_features % (16 * _CUDA_INNER_K_TILES[-1]) == 0


def pack_for_kernel(codes: Tensor, group_scale: Tensor, group_zero: Tensor, group_size: int) -> PackedInt4:
    """The kernel's layout of codes `[out, in]` uint8 in 0..15 with Δ and z `[out, groups]`; same device as codes."""
    scale = group_scale.to(torch.float32)
    offset = (8.0 - group_zero.to(torch.float32)) * scale
    offsets = torch.stack([scale.t(), offset.t()], dim=-1).to(torch.bfloat16).contiguous()
    if codes.device.type == "cpu":
        layout = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 2)
    else:
        nibbles = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
        tiles = next(tiles for tiles in _CUDA_INNER_K_TILES if codes.shape[1] % (16 * tiles) == 0)
        layout = torch.ops.aten._convert_weight_to_int4pack(nibbles, tiles)
    return PackedInt4(layout, offsets, group_size)


def int4_matmul(x: Tensor, weight: PackedInt4) -> Tensor:
    """x · Wᵀ by torch's kernel; x `[..., in]` bfloat16, result `[..., out]` bfloat16."""
    return tiles_matmul(x, weight.layout, weight.offsets, weight.group_size)


def tiles_matmul(x: Tensor, layout: Tensor, offsets: Tensor, group_size: int) -> Tensor:
    """`int4_matmul` with the parts of a PackedInt4."""
    rows = x.reshape(-1, x.shape[-1])
    if x.device.type == "cpu":
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, layout, group_size, offsets)
    else:
        product = torch.ops.aten._weight_int4pack_mm(rows, layout, group_size, offsets)
    return product.reshape(*x.shape[:-1], product.shape[-1])


def dequantize_matmul(
    x: Tensor,
    codes: Tensor,
    group_scale: Tensor,
    group_zero: Tensor,
    group_size: int,
    bias: Tensor | None = None,
) -> Tensor:
    """The reference: W dequantized in float32, rounded to the dtype of x, then a dense linear.

    x: `[..., in]`, codes: `[out, in]` uint8, group_scale and group_zero: `[out, groups]`, bias: `[out]`. Returns
    `[..., out]`.
    """
    grouped = codes.reshape(codes.shape[0], -1, group_size).to(torch.float32)
    weight = (grouped - group_zero.unsqueeze(-1).float()) * group_scale.unsqueeze(-1).float()
    return F.linear(x, weight.reshape(codes.shape).to(x.dtype), None if bias is None else bias.to(x.dtype))
