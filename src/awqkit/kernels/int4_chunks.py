"""x · Wᵀ with W on a 4-bit grid, laid out so that a GPU decoding a token reads half a byte a weight and little else.

    y_r = Σ_g Δ_rg Σ_{k in g} (q_rk − z_rg) x_k          q − z whole, sums and Δ in float32, y rounded once

No weight is rounded: Δ is kept in the narrowest dtype that holds it exactly. From `_MOST_ROWS` rows on the weight is
dequantized instead, rounded to the dtype of x like that of a dense model, and multiplied by torch; so are groups of 16.

A chunk is gcd(group size, 128) input channels of one output feature: W words of int32, W = chunk / 8. Code i of word j,
at bits 4i, is channel i · W + j of the chunk, so the inputs of one i are neighbours.

The Triton bodies are in `int4_chunks_triton`; the torch ones here are the reference, and what a CPU runs.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LARGEST_CHUNK, _SMALLEST_CHUNK = 128, 16
_MOST_ROWS = 64
_LEAST_WORDS = 4  # of a chunk, that a product is made with: with two, tl.dot was wrong on an H200 for up to 32 rows
_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class PackedChunks:
    """A 4-bit weight. words: int32 `[out, chunks, W]`; scale: Δ `[out, groups]` in 16 or 32 bits; zero: z, uint8."""

    words: Tensor
    scale: Tensor
    zero: Tensor


def chunks_take(device: torch.device, dtype: torch.dtype, in_features: int, group_size: int) -> bool:
    """Whether the Triton bodies can compute with such a weight there."""
    if device.type != "cuda" or dtype not in _DTYPES or importlib.util.find_spec("triton") is None:
        return False
    return chunks_fit(in_features, group_size) and torch.cuda.get_device_capability(device) >= (8, 0)


def chunks_fit(in_features: int, group_size: int) -> bool:
    """Whether a weight can be cut into chunks: groups, or whole rows with one scale, of a multiple of 16 channels."""
    return in_features % group_size == 0 and group_size % _SMALLEST_CHUNK == 0


def pack_chunks(codes: Tensor, group_scale: Tensor, group_zero: Tensor, group_size: int) -> PackedChunks:
    """The layout of codes `[out, in]` uint8 in 0..15 with Δ and z `[out, groups]`; same device as codes."""
    num_words = math.gcd(group_size, _LARGEST_CHUNK) // 8
    places = codes.reshape(codes.shape[0], -1, 8, num_words)
    words = torch.zeros(places.shape[0], places.shape[1], num_words, dtype=torch.int32, device=codes.device)
    for place in range(8):
        words |= places[:, :, place].to(torch.int32) << 4 * place
    scale = _narrowest(group_scale.to(torch.float32)).contiguous()
    return PackedChunks(words, scale, group_zero.to(torch.uint8).contiguous())


def unpack_codes(words: Tensor) -> Tensor:
    """The codes `[out, in]` uint8 of words `[out, chunks, W]`."""
    codes = torch.stack([words >> shift & 15 for shift in range(0, 32, 4)], dim=2)
    return codes.to(torch.uint8).reshape(len(words), -1)


def chunks_matmul(x: Tensor, weight: PackedChunks) -> Tensor:
    """x · Wᵀ; x `[..., in]` float16 or bfloat16, result `[..., out]` in the dtype of x. No gradient."""
    return torch.ops.awqkit.int4_chunks_matmul(x, weight.words, weight.scale, weight.zero)


def can_join(x: Tensor) -> bool:
    """Whether products of x with several weights are worth one launch: few rows, which no weight is dequantized for."""
    return 0 < x.numel() // x.shape[-1] <= _MOST_ROWS and x.dtype in _DTYPES


def can_be_joined(weight: PackedChunks) -> bool:
    """Whether products with such a weight are made without dequantizing it."""
    return weight.words.shape[2] >= _LEAST_WORDS


def joined_matmul(x: Tensor, weight: PackedChunks, bounds: Tensor) -> Tensor:
    """x · Wᵀ of several weights that lie one after the other in `weight`; for x that `can_join`. No gradient.

    bounds: int32, the first output feature of every one of them, and the number of all. The result is flat: all rows of
    the first product, then those of the second, so that each of them is contiguous.
    """
    return torch.ops.awqkit.int4_chunks_joined(x, weight.words, weight.scale, weight.zero, bounds)


def dequantize_chunks(words: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """(q − z) · Δ in float32, rounded to `dtype`, `[out, in]`; the parts of a PackedChunks."""
    if words.is_cuda:
        with torch.cuda.device(words.device):
            return _triton().dequantize(words, scale, zero, dtype)
    codes = unpack_codes(words).reshape(*scale.shape, -1).to(torch.float32)
    weight = (codes - zero.unsqueeze(-1).float()) * scale.unsqueeze(-1).float()
    return weight.reshape(len(words), -1).to(dtype)


def _reference(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return F.linear(x.float(), dequantize_chunks(words, scale, zero, torch.float32)).to(x.dtype)


def _on_gpu(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    with torch.cuda.device(x.device):
        if not 0 < len(rows) <= _MOST_ROWS or x.dtype not in _DTYPES or words.shape[2] < _LEAST_WORDS:
            return F.linear(x, _triton().dequantize(words, scale, zero, x.dtype))
        product = _triton().one_row if len(rows) == 1 else _triton().few_rows
        return product(rows, words, scale, zero).reshape(*x.shape[:-1], len(words))


def _joined_reference(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, bounds: Tensor) -> Tensor:
    sizes = bounds.diff().tolist()
    weights = zip(words.split(sizes), scale.split(sizes), zero.split(sizes), strict=True)
    return torch.cat([_reference(x, *weight).flatten() for weight in weights])


def _joined_on_gpu(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, bounds: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    with torch.cuda.device(x.device):
        if len(rows) == 1:
            return _triton().one_row(rows, words, scale, zero).flatten()
        return _triton().few_rows(rows, words, scale, zero, bounds=bounds).flatten()


def _joined_shape_alone(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, bounds: Tensor) -> Tensor:
    return x.new_empty(x.numel() // x.shape[-1] * len(words))


def _shape_alone(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(words))


def _narrowest(scale: Tensor) -> Tensor:
    """`scale` in 16 bits where they hold every value, else as it is."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(scale.to(dtype).to(torch.float32), scale):
            return scale.to(dtype)
    return scale


@cache
def _triton() -> Any:
    from awqkit.kernels import int4_chunks_triton

    return int4_chunks_triton


# An operator of torch, so that torch.compile takes it whole; kept here because torch forgets it with this object.
_OPERATORS = torch.library.Library("awqkit", "FRAGMENT")
_OPERATORS.define("int4_chunks_matmul(Tensor x, Tensor words, Tensor scale, Tensor zero) -> Tensor")
_OPERATORS.impl("int4_chunks_matmul", _reference, "CPU")
_OPERATORS.impl("int4_chunks_matmul", _on_gpu, "CUDA")
torch.library.register_fake("awqkit::int4_chunks_matmul", _shape_alone, lib=_OPERATORS)
_OPERATORS.define("int4_chunks_joined(Tensor x, Tensor words, Tensor scale, Tensor zero, Tensor bounds) -> Tensor")
_OPERATORS.impl("int4_chunks_joined", _joined_reference, "CPU")
_OPERATORS.impl("int4_chunks_joined", _joined_on_gpu, "CUDA")
torch.library.register_fake("awqkit::int4_chunks_joined", _joined_shape_alone, lib=_OPERATORS)
