"""GPTQ rounding: column after column, each column's error absorbed by the columns that are still free.

    for j in order:   ŵ_j = nearest grid value of w_j;   e = (w_j − ŵ_j) / U_jj;   w_k −= e · U_jk  for the later k

(Frantar 2022, Algorithm 1.) The grid of every group is fixed beforehand, so that any column order is possible without
a `g_idx` in the file; within lazy blocks of 128 columns updates are applied at once, outside after the block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from awqkit.kernels.column_block import round_block
from awqkit.numerics.grid import Grid, QuantizedWeight
from awqkit.numerics.rounding_metric import RoundingMetric

COLUMN_BLOCK = 128  # lazy updates: Frantar 2022, section 3.3, step 2
_CHUNK_VALUES = 1 << 25  # of a matrix that is made of several blocks of columns at once: 134 MB


def column_chunks(columns: int, rows: int) -> Iterator[slice]:
    """Whole blocks of columns whose grids and rows of H are made together: fewer operators, and never all of them."""
    width = max(1, _CHUNK_VALUES // max(columns, rows) // COLUMN_BLOCK) * COLUMN_BLOCK
    for start in range(0, columns, width):
        yield slice(start, min(start + width, columns))


@dataclass(frozen=True, slots=True)
class ColumnGrids:
    """Δ, z and the range of steps q − z of some columns of the order, transposed: float32 `[columns, out]`."""

    scale: Tensor
    zero: Tensor
    lowest: Tensor
    highest: Tensor

    @classmethod
    def of(cls, grid: Grid, columns: Tensor) -> ColumnGrids:
        """columns: numbers of them, int64."""
        group = columns // grid.group_size
        scale, zero = (each.t().contiguous()[group] for each in (grid.group_scale, grid.group_zero))
        return cls(scale, zero, -zero, float(2**grid.bits - 1) - zero)


def round_gptq(weight: Tensor, grid: Grid, metric: RoundingMetric) -> QuantizedWeight:
    """Codes on `grid` that nearly minimise tr(E (H + λ) Eᵀ). weight: float32 `[out, in]`."""
    order = metric.order
    # transposed: a column is then one contiguous row, which is what every step reads and writes
    remaining = weight.t()[order]
    chosen = torch.empty_like(remaining, dtype=torch.uint8)
    for chunk in column_chunks(len(order), len(weight)):
        grids, factor = ColumnGrids.of(grid, order[chunk]), metric.rounding_factor(chunk)
        steps = torch.empty_like(grids.scale)
        for start in range(0, len(steps), COLUMN_BLOCK):
            here = slice(start, start + COLUMN_BLOCK)
            block = slice(chunk.start + start, min(chunk.start + start + COLUMN_BLOCK, chunk.stop))
            steps[here], errors = round_block(
                remaining[block], grids.scale[here], grids.lowest[here], grids.highest[here], factor[here, block]
            )
            remaining[block.stop :].addmm_(factor[here, block.stop :].t(), errors, alpha=-1.0)
        chosen[chunk] = steps.add_(grids.zero).to(torch.uint8)
    codes = torch.empty_like(weight, dtype=torch.uint8)
    codes[:, order] = chosen.t()
    return QuantizedWeight(codes, grid)
