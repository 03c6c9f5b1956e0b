"""Triton bodies of `group_search`: one program tries everything on some rows of one group.

Imported only where a GPU and Triton are there. Arithmetic is that of the references; sums over rows are made of one
part per program, added up by torch, so that a run repeats itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from awqkit.kernels.replay import constants

ROWS_PER_PROGRAM = 64
# Adding and subtracting 1.5 · 2²³ rounds a float32 of small size to the nearest whole number, ties to even
_ROUND = tl.constexpr(12582912.0)
_LARGEST = {torch.bfloat16: 3.3895313892515355e38, torch.float16: 65504.0}


@triton.jit
def _whole(value):
    return (value + _ROUND) - _ROUND


@triton.jit
def _to_bfloat16(value):
    """The nearest bfloat16, ties to even, as a float32; Triton's interpreter would cut the bits off."""
    bits = value.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _row_errors(tile, low, high, blocks, variances, TOP: tl.constexpr, LARGEST: tl.constexpr,
                SYMMETRIC: tl.constexpr, HALF: tl.constexpr, FULL: tl.constexpr, unscale):  # fmt: skip
    """e H eᵀ of nearest rounding of each row of `tile` `[rows, group]` on the grid that spans low to high, `[rows]`.

    unscale: `[group]`, what the error is multiplied by.
    """
    span = 2.0 * tl.maximum(-low, high) if SYMMETRIC else high - low
    size = tl.minimum(span / TOP, LARGEST)
    size = size.to(tl.float16).to(tl.float32) if HALF else _to_bfloat16(size)
    size = tl.where(size > 0, size, 1.0)
    if SYMMETRIC:
        zero = tl.zeros_like(size) + (TOP + 1.0) / 2
    else:
        zero = tl.minimum(tl.maximum(_whole(tl.minimum(-low / size, 2.0 * TOP)), 0.0), TOP)
    # beyond the range a step is cut off anyway, and _whole wants small numbers
    steps = tl.minimum(tl.maximum(tile * (1.0 / size)[:, None], -zero[:, None]), TOP - zero[:, None])
    error = (tile - _whole(steps) * size[:, None]) * unscale[None, :]
    if FULL:
        return tl.sum(tl.dot(error, blocks, input_precision="tf32") * error, axis=1)
    return tl.sum(error * error * variances[None, :], axis=1)


@triton.jit
def _tile_of(weight, rows, real, row_stride, columns):
    return tl.load(weight + rows.to(tl.int64)[:, None] * row_stride + columns[None, :], mask=real[:, None], other=0.0)


@triton.jit
def _weights_of(group_weights, group, FULL: tl.constexpr, GROUP: tl.constexpr):
    place = tl.arange(0, GROUP)
    if FULL:
        blocks = tl.load(group_weights + group * GROUP * GROUP + place[:, None] * GROUP + place[None, :])
        variances = tl.zeros([GROUP], tl.float32)
    else:
        blocks = tl.zeros([GROUP, GROUP], tl.float32)
        variances = tl.load(group_weights + group * GROUP + place)
    return blocks, variances


@triton.jit
def _scale_kernel(
    weight, group_weights, row_weight, scales, partial,
    num_rows, num_channels, num_tried, num_groups,
    TOP: tl.constexpr, LARGEST: tl.constexpr, SYMMETRIC: tl.constexpr, HALF: tl.constexpr, FULL: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    part, group = tl.program_id(1), tl.program_id(0)
    rows = part * ROWS + tl.arange(0, ROWS)
    real = rows < num_rows
    place = tl.arange(0, GROUP)
    tile = _tile_of(weight + group * GROUP, rows, real, num_channels, place)
    cost = tl.load(row_weight + rows, mask=real, other=0.0)
    blocks, variances = _weights_of(group_weights, group, FULL, GROUP)
    for tried in range(num_tried):
        scale = tl.load(scales + tried * num_channels + group * GROUP + place)
        scaled = tile * scale[None, :]
        low = tl.minimum(tl.min(scaled, axis=1), 0.0)
        high = tl.maximum(tl.max(scaled, axis=1), 0.0)
        found = _row_errors(scaled, low, high, blocks, variances, TOP, LARGEST, SYMMETRIC, HALF, FULL, 1.0 / scale)
        tl.store(partial + (part * num_tried + tried) * num_groups + group, tl.sum(found * cost, axis=0))


@triton.jit
def _clip_kernel(
    weight, group_weights, ratios, ratio_low, ratio_high,
    num_rows, num_ratios,
    TOP: tl.constexpr, LARGEST: tl.constexpr, SYMMETRIC: tl.constexpr, HALF: tl.constexpr, FULL: tl.constexpr,
    SWEEPS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    part, group = tl.program_id(1), tl.program_id(0)
    rows = part * ROWS + tl.arange(0, ROWS)
    real = rows < num_rows
    place = tl.arange(0, GROUP)
    tile = _tile_of(weight + group.to(tl.int64) * num_rows * GROUP, rows, real, GROUP, place)
    blocks, variances = _weights_of(group_weights, group, FULL, GROUP)
    low = tl.minimum(tl.min(tile, axis=1), 0.0)
    high = tl.maximum(tl.max(tile, axis=1), 0.0)
    ones = tl.zeros_like(low) + 1.0
    unscale = tl.zeros([GROUP], tl.float32) + 1.0
    best = _row_errors(tile, low, high, blocks, variances, TOP, LARGEST, SYMMETRIC, HALF, FULL, unscale)
    best_low, best_high = ones, ones
    for sweep in range(3 if SWEEPS else 1):  # both ends, then the high one alone, then the low one alone
        held_low, held_high = best_low, best_high
        for tried in range(num_ratios):
            ratio = tl.load(ratios + tried)
            share_low = ones * ratio if sweep != 1 else held_low
            share_high = ones * ratio if sweep != 2 else held_high
            found = _row_errors(tile, low * share_low, high * share_high, blocks, variances,
                                TOP, LARGEST, SYMMETRIC, HALF, FULL, unscale)  # fmt: skip
            better = found < best
            best = tl.where(better, found, best)
            best_low = tl.where(better, share_low, best_low)
            best_high = tl.where(better, share_high, best_high)
    at = group.to(tl.int64) * num_rows + rows
    tl.store(ratio_low + at, best_low, mask=real)
    tl.store(ratio_high + at, best_high, mask=real)


def scale_errors(
    weight: Tensor,
    group_weights: Tensor,
    row_weight: Tensor,
    scales: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    stored_dtype: torch.dtype,
) -> Tensor:
    """See `group_search.scale_errors`."""
    weight, group_weights, scales = weight.contiguous(), group_weights.contiguous(), scales.contiguous()
    (rows, channels), tried = weight.shape, scales.shape[0]
    parts, groups = triton.cdiv(rows, ROWS_PER_PROGRAM), channels // group_size
    partial = torch.empty(parts, tried, groups, device=weight.device)
    _scale_kernel[(groups, parts)](
        weight, group_weights, row_weight.contiguous(), scales, partial, rows, channels, tried, groups,
        **_choices(group_weights, bits, symmetric, stored_dtype), GROUP=group_size, ROWS=ROWS_PER_PROGRAM,
        num_warps=4,
    )  # fmt: skip
    return partial.sum(dim=0)


def clip_ratios(
    grouped: Tensor,
    group_weights: Tensor,
    ratios: Sequence[float],
    bits: int,
    symmetric: bool,
    stored_dtype: torch.dtype,
    sweeps: bool,
) -> tuple[Tensor, Tensor]:
    """See `group_search.clip_ratios`."""
    grouped, group_weights = grouped.contiguous(), group_weights.contiguous()
    groups, rows, group_size = grouped.shape
    ratio_low = torch.empty(groups, rows, device=grouped.device)
    ratio_high = torch.empty_like(ratio_low)
    _clip_kernel[(groups, triton.cdiv(rows, ROWS_PER_PROGRAM))](
        grouped, group_weights, constants(tuple(ratios), grouped.device), ratio_low, ratio_high, rows, len(ratios),
        **_choices(group_weights, bits, symmetric, stored_dtype), SWEEPS=sweeps,
        GROUP=group_size, ROWS=ROWS_PER_PROGRAM, num_warps=4,
    )  # fmt: skip
    return ratio_low, ratio_high


def _choices(group_weights: Tensor, bits: int, symmetric: bool, stored_dtype: torch.dtype) -> dict[str, object]:
    return {
        "TOP": float(2**bits - 1), "LARGEST": _LARGEST[stored_dtype], "SYMMETRIC": symmetric,
        "HALF": stored_dtype == torch.float16, "FULL": group_weights.dim() == 3,
    }  # fmt: skip
