"""H made ready for rounding column after column: damped, ordered, factorised.

    H + λ = A Aᵀ,  U = A⁻¹ (both upper triangular, in `order`),  (H + λ)⁻¹ = Uᵀ U

U is the factor that GPTQ walks along (Frantar 2022, section 3.3, step 3: the Cholesky factor of H⁻¹), computed from one
Cholesky factorisation of the reversed H instead of an inverse and a second factorisation.

    D_j = 1 / U_jj²        the conditional variance of x_j given the columns that are rounded after it

GPTQ lets the later columns absorb what they explain of a column's error, so D_j, not H_jj, is what an error in column
j costs in the end. Under a channel scale H becomes S⁻¹ H S⁻¹, U becomes U S and D becomes D / s²: nothing is factorised
again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from awqkit.kernels.precision import full_precision

_FLOOR_SHARE = 1e-4  # ε: of what a column contributes on average (docs/log.md)
_SMALLEST_COLUMN = 1e-6  # of the mean column energy, so that an all-zero column's floor is finite
_SMALLEST_SHARE = 1e-9  # of the mean diagonal: what a dead channel gets, so that H stays invertible
_SMALLEST_RATIO = 1e-5  # where no damping was asked for and some is needed
_REFINEMENT_SHARE = 1e-3
_ESCALATION = 10.0
_MAX_ATTEMPTS = 6
_SOLVED_AT_ONCE = 512  # channels whose factor is inverted in one call


@dataclass(frozen=True, slots=True)
class RoundingMetric:
    """The H of one linear input x, or of x / s, ready for rounding.

    moment: H of x `[in, in]` float32, undamped. damping: λ of x / s `[in]`, added to the diagonal. order: `[in]` int64,
    the columns as they are rounded. factor: U of x `[in, in]` float32 upper triangular, rows and columns in `order`.
    damp_ratio: what was needed for a factorisation, at least what was asked for. channel_scale: s `[in]`, or None where
    it is 1. H and U of x / s are made row by row as they are asked for: each is gigabytes where `in` is large.
    """

    moment: Tensor
    damping: Tensor
    order: Tensor
    factor: Tensor
    damp_ratio: float
    channel_scale: Tensor | None = None

    @property
    def damped(self) -> Tensor:
        """H + λ of x / s, `[in, in]`."""
        return self._block(slice(None), 1.0)

    def refinement_block(self, columns: slice) -> Tensor:
        """Of H with a thousandth of λ, of x / s, `[columns, columns]`: what descent and refit minimise.

        GPTQ needs damping against what it cannot take back. Descent and refit can, and with all of λ they pull away
        from what the calibration says (docs/log.md); the rest of λ keeps dead channels finite.
        """
        return self._block(columns, _REFINEMENT_SHARE)

    def ordered_refinement_rows(self, block: slice) -> Tensor:
        """Rows of what `refinement_block` is a block of, `[block, in]`, rows and columns in `order`."""
        order, scale = self.order[block], self.channel_scale
        found = self.moment.index_select(0, order).index_select(1, self.order)
        if scale is not None:
            found.div_(scale[self.order]).div_(scale[order].unsqueeze(1))
        found.diagonal(block.start).add_(self.damping[order], alpha=_REFINEMENT_SHARE)
        return found

    def pushed(self, error: Tensor, columns: slice = slice(None)) -> Tensor:
        """E times what `refinement_block` is a block of, `[rows, in]`; error: E `[rows, columns]`, 0 elsewhere."""
        scale = self.channel_scale
        found = (error if scale is None else error / scale[columns]) @ self.moment[columns]
        if scale is not None:
            found.div_(scale)
        found[:, columns].addcmul_(error, self.damping[columns], value=_REFINEMENT_SHARE)
        return found

    def refinement_sums(self, groups: int) -> Tensor:
        """What its part between each two groups of columns adds up to, `[groups, groups]`."""
        size = len(self.damping) // groups
        member = torch.eye(groups, device=self.moment.device).repeat_interleave(size, dim=0)
        if self.channel_scale is not None:
            member = member / self.channel_scale.unsqueeze(1)
        with full_precision():
            found = member.t() @ (self.moment @ member)
        found.diagonal().add_(self.damping.reshape(groups, size).sum(dim=1), alpha=_REFINEMENT_SHARE)
        return found

    def rounding_factor(self, block: slice) -> Tensor:
        """Rows of U of x / s, `[block, in]`, rows and columns in `order`."""
        rows = self.factor[block]
        return rows if self.channel_scale is None else rows * self.channel_scale[self.order]

    def _block(self, columns: slice, share: float) -> Tensor:
        found, scale = self.moment[columns, columns].clone(), self.channel_scale
        if scale is not None:
            found.div_(scale[columns]).div_(scale[columns].unsqueeze(1))
        found.diagonal().add_(self.damping[columns], alpha=share)
        return found

    @property
    def variance(self) -> Tensor:
        """D `[in]`, in the natural order of the columns."""
        diagonal, found = self.factor.diagonal(), torch.empty_like(self.damping)
        scale = self.channel_scale
        found[self.order] = (diagonal if scale is None else diagonal * scale[self.order]).pow(-2)
        return found

    def scaled(self, channel_scale: Tensor) -> RoundingMetric:
        """The metric of the input x / s, from that of x."""
        assert self.channel_scale is None
        return RoundingMetric(
            moment=self.moment,
            damping=self.damping / channel_scale.square(),
            order=self.order,
            factor=self.factor,
            damp_ratio=self.damp_ratio,
            channel_scale=channel_scale,
        )

    def solve(self, right: Tensor) -> Tensor:
        """`right` (H + λ)⁻¹ for `right` `[rows, in]`, in the natural order."""
        assert self.channel_scale is None
        with full_precision():
            ordered = right[:, self.order] @ self.factor.t() @ self.factor
        found = torch.empty_like(ordered)
        found[:, self.order] = ordered
        return found


def energy_order(moment: Tensor, column_energy: Tensor) -> Tensor:
    """Columns by falling H_jj · mean_i W_ij², `[in]` int64: what plain rounding would cost decides who goes first.

    column_energy: `[in]`, mean squares of the weight's columns. Unlike falling H_jj (act-order) it does not change
    under a channel scale, which multiplies one factor and divides the other.
    """
    return torch.argsort(moment.diagonal() * column_energy, descending=True, stable=True)


def moment_order(moment: Tensor) -> Tensor:
    """Columns by falling H_jj, `[in]` int64: act-order of GPTQ's published code."""
    return torch.argsort(moment.diagonal(), descending=True, stable=True)


def own_damping(moment: Tensor, damp_ratio: float, column_energy: Tensor | None = None) -> Tensor:
    """λ_j = damp_ratio · H_jj + ε · mean_k(H_kk w_k²) / w_j², `[in]`: a share of each channel's energy, and a floor.

    column_energy: w² `[in]`, mean squares of the weight's columns. The floor says that no column may move by much more
    than its own size unless the output gains by it: a channel of nearly no energy would else be given weights hundreds
    of times its own to absorb errors elsewhere, and a group's range with them. Both terms follow a channel scale: λ/s².
    Without column_energy the floor is only what keeps dead channels finite.
    """
    diagonal = moment.diagonal()
    usual = _or_one(diagonal.mean().double())
    tiny = (usual * _SMALLEST_SHARE).clamp(min=torch.finfo(torch.float32).tiny).float()
    own = (damp_ratio * diagonal).clamp(min=tiny)
    if column_energy is None:
        return own
    column, contributed = column_energy.mean().double(), (diagonal * column_energy).mean().double()
    smallest = (column * _SMALLEST_COLUMN).float()
    floored = own + column_energy.clamp(min=smallest).reciprocal() * (_FLOOR_SHARE * contributed).float()
    return torch.where(column > 0, floored, own)


def mean_damping(moment: Tensor, damp_ratio: float, column_energy: Tensor | None = None) -> Tensor:
    """λ_j = damp_ratio · mean_k H_kk, `[in]`: the damping of the GPTQ paper (section 3.3, step 3)."""
    diagonal = moment.diagonal()
    return (damp_ratio * _or_one(diagonal.mean().double())).float().expand_as(diagonal).contiguous()


def _or_one(mean: Tensor) -> Tensor:
    return torch.where(mean == 0, torch.ones_like(mean), mean)


_DAMPING = {"own": own_damping, "mean": mean_damping}


def rounding_metric(
    moment: Tensor,
    order: Tensor,
    damp_ratio: float,
    damping: str = "own",
    column_energy: Tensor | None = None,
) -> RoundingMetric:
    """The metric of H `[in, in]` float32 in a column order; damping: "own" or "mean".

    Where the damped H cannot be factorised (rank deficient beyond float32), the damping grows tenfold until it can.
    Raises ValueError when it never can: H holds NaN or inf.
    """
    for attempt in range(_MAX_ATTEMPTS):
        ratio = max(damp_ratio, _SMALLEST_RATIO) * _ESCALATION**attempt if attempt else damp_ratio
        added = _DAMPING[damping](moment, ratio, column_energy)
        factor, figures = _upper_factor(moment, added, order)
        if _is_usable(figures):
            return RoundingMetric(moment, added, order, factor, ratio)
    raise ValueError(f"H of {moment.shape[0]} channels cannot be factorised: it holds NaN or inf")


def _is_usable(figures: Tensor) -> bool:
    """One look at the device: all that can be wrong. Of numbers with a NaN among them, both ends are NaN."""
    smallest, largest, *others, failed = figures.tolist()
    return smallest > 0 and largest < math.inf and failed == 0 and all(map(math.isfinite, others))


def _upper_factor(moment: Tensor, damping: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """U in `order` and what says whether it can be used, `[5]`; nothing waits for the device.

    Channels are normalised first: their energies lie six orders of magnitude apart.
    """
    size = (moment.diagonal() + damping).sqrt()
    reverse = order.flip(0)
    # each step lets go of the one before: of 28672 channels every one of them takes 3.3 GB
    matrix = (moment / size).div_(size.unsqueeze(1))
    matrix = matrix[reverse]
    matrix = matrix[:, reverse]
    matrix.diagonal().fill_(1.0)  # (H_jj + λ_j) / size_j², free of rounding
    with full_precision():
        matrix, failed = torch.linalg.cholesky_ex(matrix)
        figures = torch.stack([*torch.aminmax(size), *torch.aminmax(matrix.diagonal()), failed.to(size.dtype)])
        matrix = _inverted_(matrix)
    matrix = matrix.flip(0, 1).div_(size[order])
    return matrix.contiguous(), figures  # a solve on a GPU answers column-major, and kernels walk along rows


def _inverted_(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, in its place, by halves: a third of the work of solving for all."""
    size = len(lower)
    if size <= _SOLVED_AT_ONCE:
        identity = torch.eye(size, device=lower.device)
        return lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
    half = size // 2
    first, second = _inverted_(lower[:half, :half]), _inverted_(lower[half:, half:])
    lower[half:, :half] = (second @ (lower[half:, :half] @ first)).neg_()
    return lower
