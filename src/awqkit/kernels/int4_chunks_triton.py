"""Triton bodies of `int4_chunks`: one row, few rows, and the weight itself.

Imported only where a GPU and Triton are there. Codes become float32 without a conversion instruction (few a clock): a code
put below the exponent of 2²³⁻ˢ, s its lowest bit, is that power plus the code, exactly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ONE_ROW_TILE = (16, 8)  # output features of a program, warps
_FEW_ROWS_TILE = (32, 4)
_DEQUANTIZE_TILE = (64, 4)
_LEAST_OUT = 16  # the narrowest product of tl.dot
_PROGRAMS = 512  # enough to keep every multiprocessor of a large GPU reading


@triton.jit
def _code(words, place: tl.constexpr):
    """The codes at bits 4 · place of int32 words, float32."""
    if place < 5:
        bits = (words & (15 << (4 * place))) | ((150 - 4 * place) << 23)
        code = bits.to(tl.float32, bitcast=True) - float(1 << (23 - 4 * place))
    else:
        bits = ((words >> 20) & (15 << (4 * (place - 5)))) | ((150 - 4 * (place - 5)) << 23)
        code = bits.to(tl.float32, bitcast=True) - float(1 << (23 - 4 * (place - 5)))
    return code


@triton.jit
def _one_row_kernel(
    x, words, scale, zero, out,
    num_out, num_chunks, chunks_a_group,
    WORDS: tl.constexpr, SPLIT: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    # SPLIT chunks at a time, [SPLIT, OUT, WORDS], so that many warps read even where there are few output features
    part = tl.arange(0, SPLIT)[:, None, None]
    feature = tl.program_id(0) * OUT + tl.arange(0, OUT)[None, :, None]
    word = tl.arange(0, WORDS)[None, None, :]
    real_feature = feature < num_out
    total = tl.zeros((SPLIT, OUT, WORDS), dtype=tl.float32)
    ahead = tl.load(
        words + (part * num_out + feature) * WORDS + word,
        mask=real_feature & (part < num_chunks), other=0, eviction_policy="evict_first",
    )  # fmt: skip
    for first in range(0, num_chunks, SPLIT):
        here, later = first + part, first + SPLIT + part
        now = ahead
        ahead = tl.load(
            words + (later * num_out + feature) * WORDS + word,
            mask=real_feature & (later < num_chunks), other=0, eviction_policy="evict_first",
        )  # fmt: skip
        group_at = (here // chunks_a_group) * num_out + feature
        real = real_feature & (here < num_chunks)
        step = tl.load(scale + group_at, mask=real, other=0.0).to(tl.float32)
        shift = tl.load(zero + group_at, mask=real, other=0).to(tl.float32)
        x_at = here * (8 * WORDS) + word
        product = tl.zeros((SPLIT, OUT, WORDS), dtype=tl.float32)
        x_sum = tl.zeros((SPLIT, 1, WORDS), dtype=tl.float32)
        for place in tl.static_range(8):
            inputs = tl.load(x + x_at + place * WORDS, mask=here < num_chunks, other=0.0).to(tl.float32)
            product += _code(now, place) * inputs
            x_sum += inputs
        total += (product - shift * x_sum) * step
    features = tl.program_id(0) * OUT + tl.arange(0, OUT)
    result = tl.sum(tl.sum(total, axis=2), axis=0)
    tl.store(out + features, result.to(out.dtype.element_ty), mask=features < num_out)


@triton.jit
def _few_rows_kernel(
    x, words, scale, zero, partial,
    num_rows, num_out, num_in, num_chunks, chunks_a_group, chunks_a_program,
    WORDS: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows, features = tl.arange(0, ROWS), tl.program_id(0) * OUT + tl.arange(0, OUT)
    word, column = tl.arange(0, WORDS), tl.arange(0, 8 * WORDS)
    real_rows, real_features = rows < num_rows, features < num_out
    total = tl.zeros((ROWS, OUT), dtype=tl.float32)
    first = tl.program_id(1) * chunks_a_program
    for chunk in range(first, tl.minimum(first + chunks_a_program, num_chunks)):
        now = tl.load(
            words + (chunk * num_out + features[:, None]) * WORDS + word[None, :],
            mask=real_features[:, None], other=0, eviction_policy="evict_first",
        )  # fmt: skip
        group_at = (chunk // chunks_a_group) * num_out + features
        step = tl.load(scale + group_at, mask=real_features, other=0.0).to(tl.float32)
        shift = tl.load(zero + group_at, mask=real_features, other=0).to(tl.float32)[:, None]
        inputs = tl.load(
            x + rows[:, None] * num_in + chunk * (8 * WORDS) + column[None, :], mask=real_rows[:, None], other=0.0
        )
        # whole numbers of at most 15 are exact in every dtype; joined they are [OUT, WORDS, place in three bits]
        kind = x.dtype.element_ty
        evens = tl.join(
            tl.join((_code(now, 0) - shift).to(kind), (_code(now, 4) - shift).to(kind)),
            tl.join((_code(now, 2) - shift).to(kind), (_code(now, 6) - shift).to(kind)),
        )
        odds = tl.join(
            tl.join((_code(now, 1) - shift).to(kind), (_code(now, 5) - shift).to(kind)),
            tl.join((_code(now, 3) - shift).to(kind), (_code(now, 7) - shift).to(kind)),
        )
        steps = tl.join(evens, odds)  # last three: bit 2, bit 1, bit 0 of the place
        turned = tl.reshape(tl.permute(steps, (2, 3, 4, 1, 0)), (8 * WORDS, OUT))
        # ieee: a no-op for 16 bits on the GPU
        total += tl.dot(inputs, turned, input_precision="ieee") * step[None, :]
    at = (tl.program_id(1) * num_rows + rows[:, None]) * num_out + features[None, :]
    tl.store(partial + at, total.to(partial.dtype.element_ty), mask=real_rows[:, None] & real_features[None, :])


@triton.jit
def _sum_kernel(partial, out, count, num_partials, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), dtype=tl.float32)
    for each in range(num_partials):
        total += tl.load(partial + each * count + at, mask=at < count, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < count)


@triton.jit
def _dequantize_kernel(
    words, scale, zero, out, num_out, num_in, chunks_a_group, WORDS: tl.constexpr, OUT: tl.constexpr
):
    feature = tl.program_id(0) * OUT + tl.arange(0, OUT)[:, None]
    word, chunk, real = tl.arange(0, WORDS)[None, :], tl.program_id(1), feature < num_out
    now = tl.load(words + (chunk * num_out + feature) * WORDS + word, mask=real, other=0)
    group_at = (chunk // chunks_a_group) * num_out + feature
    step = tl.load(scale + group_at, mask=real, other=0.0).to(tl.float32)
    shift = tl.load(zero + group_at, mask=real, other=0).to(tl.float32)
    at = feature.to(tl.int64) * num_in + chunk * (8 * WORDS) + word
    for place in tl.static_range(8):
        value = (_code(now, place) - shift) * step
        tl.store(out + at + place * WORDS, value.to(out.dtype.element_ty), mask=real)


def one_row(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, tile: tuple[int, int] = _ONE_ROW_TILE
) -> Tensor:
    """x `[1, in]` -> `[1, out]`; the rest as in `int4_chunks.PackedChunks`. tile: output features, warps of a program."""
    chunks, out_features, num_words = words.shape
    out, (width, warps) = x.new_empty(1, out_features), tile
    # two vectors of four words a thread
    split = max(1, min(triton.next_power_of_2(chunks), 256 * warps // (width * num_words)))
    _one_row_kernel[(triton.cdiv(out_features, width),)](
        x, words, scale, zero, out, out_features, chunks, chunks // scale.shape[0],
        WORDS=num_words, SPLIT=split, OUT=width, num_warps=warps,
    )  # fmt: skip
    return out


def few_rows(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor,
    tile: tuple[int, int] = _FEW_ROWS_TILE, programs: int = _PROGRAMS,
) -> Tensor:  # fmt: skip
    """x `[rows, in]` contiguous -> `[rows, out]`, rows at most 64; programs: how many to aim at by splitting the chunks."""
    chunks, out_features, num_words = words.shape
    (rows, in_features), (width, warps) = x.shape, tile
    out, across = x.new_empty(rows, out_features), triton.cdiv(out_features, width)
    each = triton.cdiv(chunks, max(1, min(chunks, programs // across)))
    parts = triton.cdiv(chunks, each)
    partial = out if parts == 1 else x.new_empty(parts, rows, out_features, dtype=torch.float32)
    _few_rows_kernel[(across, parts)](
        x, words, scale, zero, partial, rows, out_features, in_features, chunks, chunks // scale.shape[0], each,
        WORDS=num_words, OUT=width, ROWS=max(_LEAST_OUT, triton.next_power_of_2(rows)), num_warps=warps,
    )  # fmt: skip
    if parts > 1:
        _sum_kernel[(triton.cdiv(out.numel(), 512),)](partial, out, out.numel(), parts, SIZE=512, num_warps=4)
    return out


def dequantize(words: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """(q − z) · Δ in float32, rounded to `dtype`, `[out, in]`."""
    chunks, out_features, num_words = words.shape
    in_features, (width, warps) = chunks * 8 * num_words, _DEQUANTIZE_TILE
    out = torch.empty(out_features, in_features, dtype=dtype, device=words.device)
    _dequantize_kernel[(triton.cdiv(out_features, width), chunks)](
        words, scale, zero, out, out_features, in_features, chunks // scale.shape[0],
        WORDS=num_words, OUT=width, num_warps=warps,
    )  # fmt: skip
    return out
