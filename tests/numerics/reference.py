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


def refit_group(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    group: slice,
    damped: Tensor,
    bits: int,
    symmetric: bool,
    stored_dtype: torch.dtype,
) -> tuple[float, float, float]:
    """The exact least-squares Δ of one row's group, then that Δ as it is kept, then its z; all else is held.

    weight, codes, scale, zero: one row, `[in]` float64. The stored Δ is taken only where the row's error falls and it
    is less than a factor of four away; z is the best of all whole numbers, the present one where several are equal.
    """
    root = torch.linalg.cholesky(damped)

    def row_error(group_scale: float, group_zero: float) -> float:
        value = meaning(codes, scale, zero)
        value[group] = (codes[group] - group_zero) * group_scale
        return float(((value - weight) @ root).square().sum())

    old_scale, old_zero = float(scale[group][0]), float(zero[group][0])
    others = meaning(codes, scale, zero)
    others[group] = 0.0
    steps = torch.zeros_like(weight)
    steps[group] = codes[group] - old_zero
    exact = float(torch.linalg.lstsq((steps @ root).unsqueeze(1), ((weight - others) @ root).unsqueeze(1)).solution)
    stored = float(torch.tensor(exact).to(stored_dtype))
    falls = row_error(stored, old_zero) < row_error(old_scale, old_zero)
    kept = stored if falls and 0.25 < stored / old_scale < 4 else old_scale
    zeros = [old_zero] if symmetric else sorted(range(2**bits), key=lambda z: abs(z - old_zero))
    return exact, kept, min(zeros, key=lambda z: row_error(kept, z))


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
