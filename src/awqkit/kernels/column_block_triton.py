"""Triton bodies of `column_block`: one program holds the block's columns of a few rows in registers.

Imported only where a GPU and Triton are there. Arithmetic is that of the reference in the same order, so results differ
from it at most where a value lies within rounding of a tie.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS_PER_PROGRAM = 16
# Adding and subtracting 1.5 · 2²³ rounds a float32 of small size to the nearest whole number, ties to even
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def _whole(value):
    return (value + _ROUND) - _ROUND


@triton.jit
def _round_kernel(
    weight, scale, lowest, highest, factor, steps, errors,
    num_rows, factor_stride,
    num_columns: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    real_rows, real_columns = rows < num_rows, columns < num_columns
    tile_at = columns[:, None] * num_rows + rows[None, :]
    tile = tl.load(weight + tile_at, mask=real_columns[:, None] & real_rows[None, :], other=0.0)
    for j in range(num_columns):
        at = j * num_rows + rows
        column = tl.sum(tl.where(columns[:, None] == j, tile, 0.0), axis=0)
        step_size = tl.load(scale + at, mask=real_rows, other=1.0)
        low = tl.load(lowest + at, mask=real_rows, other=0.0)
        high = tl.load(highest + at, mask=real_rows, other=0.0)
        step = _whole(tl.minimum(tl.maximum(column / step_size, low), high))
        own = tl.load(factor + j * factor_stride + j)
        error = (column - step * step_size) / own
        tl.store(steps + at, step, mask=real_rows)
        tl.store(errors + at, error, mask=real_rows)
        feed = tl.load(factor + j * factor_stride + columns, mask=real_columns & (columns > j), other=0.0)
        tile -= feed[:, None] * error[None, :]


@triton.jit
def _descend_kernel(
    steps, residual, scale, lowest, highest, moment, moved, changes,
    num_rows, moment_stride,
    num_columns: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    real_rows, real_columns = rows < num_rows, columns < num_columns
    tile_at = columns[:, None] * num_rows + rows[None, :]
    tile = tl.load(residual + tile_at, mask=real_columns[:, None] & real_rows[None, :], other=0.0)
    for j in range(num_columns):
        at = j * num_rows + rows
        pull = tl.sum(tl.where(columns[:, None] == j, tile, 0.0), axis=0)
        step = tl.load(steps + at, mask=real_rows, other=0.0)
        step_size = tl.load(scale + at, mask=real_rows, other=1.0)
        low = tl.load(lowest + at, mask=real_rows, other=0.0)
        high = tl.load(highest + at, mask=real_rows, other=0.0)
        own = tl.load(moment + j * moment_stride + j)
        vertex = _whole(tl.minimum(tl.maximum(step - pull / (own * step_size), low), high))
        change = (vertex - step) * step_size
        tl.store(moved + at, vertex, mask=real_rows)
        tl.store(changes + at, change, mask=real_rows)
        feed = tl.load(moment + j * moment_stride + columns, mask=real_columns, other=0.0)
        tile += feed[:, None] * change[None, :]


def round_block(
    weight: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """See `column_block.round_block`."""
    weight, scale, lowest, highest = (each.contiguous() for each in (weight, scale, lowest, highest))
    steps, errors = torch.empty_like(weight), torch.empty_like(weight)
    columns, rows = weight.shape
    _round_kernel[(triton.cdiv(rows, ROWS_PER_PROGRAM),)](
        weight, scale, lowest, highest, factor, steps, errors, rows, factor.stride(0),
        num_columns=columns, COLUMNS=triton.next_power_of_2(columns), ROWS=ROWS_PER_PROGRAM,
        num_warps=1,  # a column is then summed within one warp: half the time of four
    )  # fmt: skip
    return steps, errors


def descend_block(
    steps: Tensor, residual: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor, moment: Tensor
) -> tuple[Tensor, Tensor]:
    """See `column_block.descend_block`."""
    steps, residual, scale, lowest, highest = (each.contiguous() for each in (steps, residual, scale, lowest, highest))
    moved, changes = torch.empty_like(steps), torch.empty_like(steps)
    columns, rows = steps.shape
    _descend_kernel[(triton.cdiv(rows, ROWS_PER_PROGRAM),)](
        steps, residual, scale, lowest, highest, moment, moved, changes, rows, moment.stride(0),
        num_columns=columns, COLUMNS=triton.next_power_of_2(columns), ROWS=ROWS_PER_PROGRAM,
        num_warps=1,  # a column is then summed within one warp: half the time of four
    )  # fmt: skip
    return moved, changes
