"""Rounding with end-loss sensitivity: rows meet in the objective, and later rows absorb the errors of earlier ones.

    tr(G E H Eᵀ),   G = E[g gᵀ] of the gradient at the linear's output

(YAQA, Tseng 2025, section 4; GuidedQuant, Kim 2025.)

As GPTQ feeds a column's error through H⁻¹ to the later columns, a block of rows feeds its error through G⁻¹ to the
later rows: with G⁻¹ = Uᵀ U in the order of the rows, W_later −= U_a,laterᵀ U_aa⁻ᵀ (W_a − Ŵ_a). Within a block rows are
rounded alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from awqkit.methods.evidence import Evidence
from awqkit.methods.linear import Rounded, Rounder, ScaledWeight, round_rows_alike
from awqkit.methods.plan import LinearPlan
from awqkit.numerics.grid import Grid, QuantizedWeight, dequantize
from awqkit.numerics.rounding_metric import RoundingMetric, moment_order, rounding_metric

ROWS_AT_ONCE = 192  # at least: blocks of 64 were no better and slower (docs/log.md)
MOST_BLOCKS = 8  # of a linear: a few rows of a large one leave a GPU idle
DAMP_RATIO = 0.05


def sensitive_rounder(sensitivity: Tensor) -> Rounder:
    """`round_rows_alike` for an objective with G `[out, out]` of the original units."""
    metric = rounding_metric(sensitivity, moment_order(sensitivity), DAMP_RATIO)
    return partial(_round_row_blocks, metric)


def _round_row_blocks(rows: RoundingMetric, scaled: ScaledWeight, evidence: Evidence, plan: LinearPlan) -> Rounded:
    order, factor = rows.order, rows.factor
    remaining = scaled.target[order]
    parts: list[Rounded] = []
    at_once = max(ROWS_AT_ONCE, -(-len(order) // MOST_BLOCKS))
    for start in range(0, len(order), at_once):
        end = min(start + at_once, len(order))
        target = remaining[start:end]
        block = scaled.of_rows(target, order[start:end])
        rounded = round_rows_alike(block, evidence, plan)
        parts.append(rounded)
        if end < len(order):
            error = target - block.restored(dequantize(rounded.quantized.codes, rounded.quantized.grid))
            scaled_error = torch.linalg.solve_triangular(factor[start:end, start:end].t(), error, upper=False)
            remaining[end:] -= factor[start:end, end:].t() @ scaled_error
    return joined_rows(parts, order)


def joined_rows(parts: Sequence[Rounded], order: Tensor) -> Rounded:
    """Rows that were rounded apart as one. order: which row of the whole each of them is, one part after the other."""
    back = torch.argsort(order)
    grid = parts[0].quantized.grid
    joined = Grid(
        grid.bits,
        grid.group_size,
        grid.symmetric,
        torch.cat([part.quantized.grid.group_scale for part in parts])[back],
        torch.cat([part.quantized.grid.group_zero for part in parts])[back],
    )
    codes = torch.cat([part.quantized.codes for part in parts])[back]
    return Rounded(QuantizedWeight(codes, joined), _joined_range(parts, len(order)))


def _joined_range(parts: Sequence[Rounded], num_rows: int) -> Tensor | None:
    ranges = [part.kept_range for part in parts if part.kept_range is not None]
    if not ranges:
        return None
    means = (each[:1] * len(part.quantized.codes) for each, part in zip(ranges, parts, strict=True))
    mean = sum(means, start=torch.zeros_like(ranges[0][:1])) / num_rows
    return torch.cat([mean, torch.stack(ranges)[:, 1:].sum(dim=0)])
