"""Triton bodies of `int4_chunks`: one row, few rows, and the weight itself.

Imported only where a GPU and Triton are there. Codes become float32 without a conversion instruction (few a clock), in
one of two ways. A code put below the exponent of 2²³⁻ˢ, s its lowest bit, is that power plus the code, exactly. And any
whole number v < 2²⁴ in the bits of a float32 is v · 2⁻¹⁴⁹, below the normal numbers and in the first of them alike: a
code is multiplied as it lies in its word, by x · 2ᵏ.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Output features of a program and warps: every warp has all of the features, which share what is done to x
_ONE_ROW_TILE, _LONG_ROW_TILE = (8, 2), (8, 4)
_LONG_ROW = 1024  # words, from which on twice the warps read a row faster
_FEW_ROWS_TILE = (64, 4)
_DEQUANTIZE_TILE = (64, 4)
_LEAST_ROWS = 16  # of a product of tl.dot
_WORDS_A_LANE = 4  # of one output feature at a time: 512 bytes of a warp in a piece
_PROGRAMS = 512  # enough to keep every multiprocessor of a large GPU reading
# An argument of the kernels: in a register once, where a constant is moved there for every code
_MASK = 15


@triton.jit
def _step(words, zero, mask, place: tl.constexpr):
    """q − z of the codes at bits 4 · place of int32 words, float32; exact, though zero is added to the power first."""
    at: tl.constexpr = place if place < 5 else place - 5
    moved = words if place < 5 else words >> 20
    bits = (moved & (mask << (4 * at))) | ((150 - 4 * at) << 23)
    return bits.to(tl.float32, bitcast=True) - (zero + float(1 << (23 - 4 * at)))


@triton.jit
def _add_product(total, words, inputs, place: tl.constexpr):
    """total + 2⁻⁶⁹ · inputs · the codes at bits 4 · place of int32 words; shifted at the last two places alone."""
    at: tl.constexpr = 4 * place if place < 6 else 4 * place - 8
    moved = words if place < 6 else words >> 8
    return tl.fma((moved & (15 << at)).to(tl.float32, bitcast=True), inputs * 2.0 ** (80 - at), total)


@triton.jit
def _one_row_kernel(
    x, words, scale, zero, out,
    num_out, num_chunks, num_groups,
    TURNS: tl.constexpr, CHUNKS_A_GROUP: tl.constexpr, WORDS: tl.constexpr, SPLIT: tl.constexpr, OUT: tl.constexpr,
    BESIDE: tl.constexpr,
):  # fmt: skip
    # Sums are 2⁻⁶⁹ of the real ones: x · 2⁸⁰ is finite while |x| < 2⁴⁵, any float16 among them, and terms q x keep
    # their 24 bits from 2⁻⁵⁷ on; below, an error of 2⁻⁸⁰ each. z is a whole number of 2⁻¹⁴⁹ like the codes.
    # A lane has the same channels of all features, so that x is read and prepared once for them. That follows from
    # loading words in two dimensions, four a lane; the third tells chunks apart. What lies outside counts with Δ = 0
    features = tl.program_id(0) * OUT + tl.arange(0, OUT)
    feature = tl.minimum(features, num_out - 1)
    column = tl.arange(0, SPLIT * WORDS)[None, :]
    row = words + feature[:, None] * num_chunks * WORDS
    feature = feature[:, None, None]
    part, word = tl.arange(0, SPLIT)[None, :, None], tl.arange(0, WORDS)[None, None, :]
    total = tl.zeros((OUT, SPLIT, WORDS // BESIDE), dtype=tl.float32)
    ahead = tl.load(row + column, mask=column < num_chunks * WORDS, other=0, eviction_policy="evict_first")
    for turn in range(TURNS):
        first = turn * SPLIT
        now, here = tl.reshape(ahead, (OUT, SPLIT, WORDS)), tl.minimum(first + part, num_chunks - 1)
        later = (first + SPLIT) * WORDS + column
        ahead = tl.load(row + later, mask=later < num_chunks * WORDS, other=0, eviction_policy="evict_first")
        group_at = feature * num_groups + here // CHUNKS_A_GROUP
        step = tl.where(first + part < num_chunks, tl.load(scale + group_at).to(tl.float32), 0.0)
        shift = tl.load(zero + group_at).to(tl.int32).to(tl.float32, bitcast=True)
        product = tl.zeros((OUT, SPLIT, WORDS), dtype=tl.float32)
        together = tl.zeros((1, SPLIT, WORDS), dtype=tl.float32)
        for place in tl.static_range(8):
            inputs = tl.load(x + here * (8 * WORDS) + place * WORDS + word).to(tl.float32)
            together += inputs
            product = _add_product(product, now, inputs, place)
        # over the words of one lane, before what is done once a chunk: z Σ x taken away, times Δ
        product = tl.sum(tl.reshape(product, (OUT, SPLIT, WORDS // BESIDE, BESIDE)), axis=3)
        together = tl.sum(tl.reshape(together, (1, SPLIT, WORDS // BESIDE, BESIDE)), axis=3)
        total = tl.fma(tl.fma(shift, together * -(2.0**80), product), step, total)
    result = tl.sum(tl.sum(total, axis=2), axis=1) * 2.0**69
    tl.store(out + features, result.to(out.dtype.element_ty), mask=features < num_out)


@triton.jit
def _few_rows_kernel(
    x, words, scale, zero, bounds, partial,
    num_rows, num_out, num_chunks, num_groups, mask,
    TURNS: tl.constexpr, CHUNKS_A_GROUP: tl.constexpr, WORDS: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr,
    WEIGHTS: tl.constexpr,
):  # fmt: skip
    rows, features = tl.arange(0, ROWS), tl.program_id(0) * OUT + tl.arange(0, OUT)
    word, column = tl.arange(0, WORDS), tl.arange(0, 8 * WORDS)
    kind = x.dtype.element_ty
    real_rows, feature = rows < num_rows, tl.minimum(features, num_out - 1)
    total = tl.zeros((ROWS, OUT), dtype=tl.float32)
    for turn in range(TURNS):
        wanted = tl.program_id(1) * TURNS + turn
        chunk = tl.minimum(wanted, num_chunks - 1)  # what lies outside counts with Δ = 0
        group_at = feature * num_groups + chunk // CHUNKS_A_GROUP
        step = tl.where(wanted < num_chunks, tl.load(scale + group_at).to(tl.float32), 0.0)
        shift = tl.load(zero + group_at).to(tl.float32)
        word_at, x_at = (feature * num_chunks + chunk) * WORDS, (rows * num_chunks + chunk) * (8 * WORDS)
        # whole numbers of at most 15 are exact in every dtype
        if WORDS >= 16 and ROWS < 32:
            # a product a place: its operand is in the lanes that loaded the words, where one of all places would change
            # hands; with more rows that is quicker
            now = tl.load(words + word_at[None, :] + word[:, None], eviction_policy="evict_first")
            product = tl.zeros((ROWS, OUT), dtype=tl.float32)
            for place in tl.static_range(8):
                at = x_at[:, None] + place * WORDS + word[None, :]
                inputs = tl.load(x + at, mask=real_rows[:, None], other=0.0)
                product = tl.dot(inputs, _step(now, shift[None, :], mask, place).to(kind), product)
        else:  # or too few words for tl.dot; joined they are [OUT, WORDS, place in three bits]
            now = tl.load(words + word_at[:, None] + word[None, :], eviction_policy="evict_first")
            less = shift[:, None]
            inputs = tl.load(x + x_at[:, None] + column[None, :], mask=real_rows[:, None], other=0.0)
            evens = tl.join(
                tl.join(_step(now, less, mask, 0).to(kind), _step(now, less, mask, 4).to(kind)),
                tl.join(_step(now, less, mask, 2).to(kind), _step(now, less, mask, 6).to(kind)),
            )
            odds = tl.join(
                tl.join(_step(now, less, mask, 1).to(kind), _step(now, less, mask, 5).to(kind)),
                tl.join(_step(now, less, mask, 3).to(kind), _step(now, less, mask, 7).to(kind)),
            )
            steps = tl.permute(tl.join(evens, odds), (2, 3, 4, 1, 0))
            product = tl.dot(inputs, tl.reshape(steps, (8 * WORDS, OUT)))
        total += product * step[None, :]
    first, width = features * 0, features * 0 + num_out  # of the weight that a feature is of, its features
    for weight in tl.static_range(WEIGHTS):
        start, end = tl.load(bounds + weight), tl.load(bounds + weight + 1)
        first = tl.where(features >= start, start, first)
        width = tl.where(features >= start, end - start, width)
    at = tl.program_id(1) * num_rows * num_out + (first * num_rows + features - first)[None, :]
    at += rows[:, None] * width[None, :]
    real = real_rows[:, None] & (features < num_out)[None, :]
    tl.store(partial + at, total.to(partial.dtype.element_ty), mask=real)


@triton.jit
def _sum_kernel(partial, out, count, PARTIALS: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), dtype=tl.float32)
    for each in range(PARTIALS):
        total += tl.load(partial + each * count + at, mask=at < count, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < count)


@triton.jit
def _dequantize_kernel(
    words, scale, zero, out,
    num_out, num_chunks, num_groups, mask,
    CHUNKS_A_GROUP: tl.constexpr, WORDS: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0) * OUT + tl.arange(0, OUT)[:, None]
    word, chunk, real = tl.arange(0, WORDS)[None, :], tl.program_id(1), feature < num_out
    now = tl.load(words + (feature * num_chunks + chunk) * WORDS + word, mask=real, other=0)
    group_at = feature * num_groups + chunk // CHUNKS_A_GROUP
    step = tl.load(scale + group_at, mask=real, other=0.0).to(tl.float32)
    shift = tl.load(zero + group_at, mask=real, other=0).to(tl.float32)
    at = (feature.to(tl.int64) * num_chunks + chunk) * (8 * WORDS) + word
    for place in tl.static_range(8):
        value = _step(now, shift, mask, place) * step
        tl.store(out + at + place * WORDS, value.to(out.dtype.element_ty), mask=real)


def one_row(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, tile: tuple[int, int] | None = None) -> Tensor:
    """x `[1, in]` -> `[1, out]`; the rest as in `int4_chunks.PackedChunks`. tile: output features and warps."""
    (out_features, chunks, num_words), groups = words.shape, scale.shape[1]
    width, warps = tile or (_LONG_ROW_TILE if chunks * num_words > _LONG_ROW else _ONE_ROW_TILE)
    out, split = x.new_empty(1, out_features), 32 * warps * _WORDS_A_LANE // num_words
    _one_row_kernel[(triton.cdiv(out_features, width),)](
        x, words, scale, zero, out, out_features, chunks, groups, TURNS=triton.cdiv(chunks, split),
        CHUNKS_A_GROUP=chunks // groups, WORDS=num_words, SPLIT=split, OUT=width,
        BESIDE=min(num_words, _WORDS_A_LANE), num_warps=warps,
    )  # fmt: skip
    return out


def few_rows(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor,
    tile: tuple[int, int] | None = None, programs: int = _PROGRAMS, bounds: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x `[rows, in]` contiguous -> `[rows, out]`, rows at most 64; programs: how many to split the chunks for.

    bounds: of the weights that lie one after the other; the result has their products one after the other.
    """
    (out_features, chunks, num_words), groups, (width, warps) = words.shape, scale.shape[1], tile or _FEW_ROWS_TILE
    rows, across = len(x), triton.cdiv(out_features, width)
    each = triton.cdiv(chunks, max(1, min(chunks, programs // across)))
    parts = triton.cdiv(chunks, each)
    out = x.new_empty(rows, out_features)
    partial = out if parts == 1 else x.new_empty(parts, rows, out_features, dtype=torch.float32)
    _few_rows_kernel[(across, parts)](
        x, words, scale, zero, bounds, partial, rows, out_features, chunks, groups, _MASK, TURNS=each,
        CHUNKS_A_GROUP=chunks // groups, WORDS=num_words, OUT=width,
        ROWS=max(_LEAST_ROWS, triton.next_power_of_2(rows)), WEIGHTS=0 if bounds is None else len(bounds) - 1,
        num_warps=warps,
    )  # fmt: skip
    if parts > 1:
        _sum_kernel[(triton.cdiv(out.numel(), 512),)](partial, out, out.numel(), PARTIALS=parts, SIZE=512, num_warps=4)
    return out


def dequantize(words: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """(q − z) · Δ in float32, rounded to `dtype`, `[out, in]`."""
    (out_features, chunks, num_words), groups, (width, warps) = words.shape, scale.shape[1], _DEQUANTIZE_TILE
    out = torch.empty(out_features, chunks * 8 * num_words, dtype=dtype, device=words.device)
    _dequantize_kernel[(triton.cdiv(out_features, width), chunks)](
        words, scale, zero, out, out_features, chunks, groups, _MASK,
        CHUNKS_A_GROUP=chunks // groups, WORDS=num_words, OUT=width, num_warps=warps,
    )  # fmt: skip
    return out
