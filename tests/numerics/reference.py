"""Rounding, descent, refit and propagation in float64, slow and obvious: loops, explicit inverses, all values tried.

Nothing here is shared with the package: no Cholesky factor, no residual that is kept up to date, no closed form where
trying everything is possible.
"""

from __future__ import annotations

import torch
from torch import Tensor


def objective(error: Tensor, damped: Tensor) -> float:
    """tr(E (H + λ) Eᵀ)."""
    return float(torch.trace(error.double() @ damped.double() @ error.double().t()))


def two_sided_objective(error: Tensor, moment: Tensor, sensitivity: Tensor) -> float:
    """tr(G E H Eᵀ)."""
    return float(torch.trace(sensitivity.double() @ error.double() @ moment.double() @ error.double().t()))


def per_column(of_groups: Tensor, group_size: int) -> Tensor:
    """`[out, groups]` as `[out, in]` float64."""
    return of_groups.double().repeat_interleave(group_size, dim=1)


def meaning(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """(q − z) · Δ, all `[out, in]`."""
    return (codes.double() - zero) * scale


def conditional_variance(damped: Tensor, order: Tensor) -> Tensor:
    """Var(x_j | columns after j in `order`), by the inverse of the block of j and those columns."""
    found = torch.empty(len(order), dtype=torch.float64)
    for position in range(len(order)):
        free = order[position:]
        found[order[position]] = 1.0 / torch.linalg.inv(damped.double()[free][:, free])[0, 0]
    return found


def gptq(
    weight: Tensor, scale: Tensor, zero: Tensor, bits: int, damped: Tensor, order: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes, and how far each weight was from a tie between two codes, in steps; both `[out, in]`.

    The textbook recursion (optimal brain surgeon): a column's error goes to all free columns through the inverse of the
    H of the free columns, computed afresh for every column. scale, zero: `[out, in]` float64.
    """
    remaining = weight.double().clone()
    codes, margin = torch.empty_like(remaining), torch.empty_like(remaining)
    for position in range(len(order)):
        column, free = order[position], order[position:]
        inverse = torch.linalg.inv(damped.double()[free][:, free])
        exact = remaining[:, column] / scale[:, column] + zero[:, column]
        codes[:, column] = exact.round().clamp(0, 2**bits - 1)
        margin[:, column] = _from_tie(exact, bits)
        error = remaining[:, column] - meaning(codes[:, column], scale[:, column], zero[:, column])
        remaining[:, free] -= error.unsqueeze(1) * inverse[0] / inverse[0, 0]
    return codes, margin


def descent_sweep(
    weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bits: int, damped: Tensor, order: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes after one sweep, every weight given the best of all its codes; and the distance from a tie, in steps."""
    weight, damped = weight.double(), damped.double()
    codes = codes.double().clone()
    margin = torch.empty_like(weight)
    for row in range(len(weight)):
        for column in order.tolist():
            errors = []
            for code in range(2**bits):
                tried = codes[row].clone()
                tried[column] = code
                error = meaning(tried, scale[row], zero[row]) - weight[row]
                errors.append(float(error @ damped @ error))
            best, second = sorted(errors)[:2]
            codes[row, column] = errors.index(best)
            # the objective is a parabola: two neighbouring codes differ by 2 d H_jj Δ² at a distance d from their tie
            margin[row, column] = (second - best) / float(2 * damped[column, column] * scale[row, column] ** 2)
    return codes, margin


def refit_row(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    group_size: int,
    damped: Tensor,
    stored_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """One row's least-squares Δ of all groups together, and the Δ that is kept, `[groups]` float64 each.

    weight, codes: `[in]`, scale, zero: `[groups]`, all float64. Stored values are taken, all or none, where the row's
    error falls and each is less than a factor of four away.
    """
    root = torch.linalg.cholesky(damped)
    groups = len(scale)
    columns = torch.zeros(groups, len(weight), dtype=torch.float64)
    for g in range(groups):
        inside = slice(g * group_size, (g + 1) * group_size)
        columns[g, inside] = codes[inside] - zero[g]

    def row_error(group_scale: Tensor) -> float:
        return float(((group_scale @ columns - weight) @ root).square().sum())

    exact = torch.linalg.lstsq((columns @ root).t(), (weight @ root).unsqueeze(1)).solution.squeeze(1)
    stored = exact.to(stored_dtype).double()
    stored = torch.where((stored > 0.25 * scale) & (stored < 4 * scale), stored, scale)
    return exact, stored if row_error(stored) < row_error(scale) else scale


def correction(cross: Tensor, moment: Tensor, damped: Tensor) -> Tensor:
    """(C − Ĥ)(Ĥ + λ)⁻¹."""
    return (cross.double() - moment.double()) @ torch.linalg.inv(damped.double())


def fed_back_rows(weight: Tensor, error: Tensor, sensitivity: Tensor, done: Tensor, free: Tensor) -> Tensor:
    """What the free rows should aim at once the rows `done` have the error Ŵ − W, `[free, in]`: the minimum of
    tr(G E H Eᵀ) over the free rows, W_b − G_bb⁻¹ G_ba E_a."""
    inverse = torch.linalg.inv(sensitivity.double()[free][:, free])
    return weight.double()[free] - inverse @ sensitivity.double()[free][:, done] @ error.double()[done]


def equal_up_to_ties(found: Tensor, expected: Tensor, margin: Tensor, order: Tensor, tolerance: float) -> bool:
    """Whether each row's codes agree in `order` at least up to a weight that was that close to a tie.

    After a tie the two may part: later columns absorb another error.
    """
    for row in range(len(found)):
        differs = (found[row].double() != expected[row].double())[order]
        if bool(differs.any()) and float(margin[row, order[int(differs.nonzero()[0])]]) > tolerance:
            return False
    return True


def _from_tie(exact: Tensor, bits: int) -> Tensor:
    """Distance of a real code from the nearest midpoint between two codes of the grid."""
    inside = exact.clamp(0, 2**bits - 1)
    return (inside - inside.floor() - 0.5).abs() + (exact - inside).abs()
