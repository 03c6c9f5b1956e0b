"""What can still move once the codes are chosen: scales and the gains that folds use, each by a factor near 1.

    groups   Δ' = Δ · e^θ, a θ for every group of every row
    rows     the same θ for all groups of a row: the linear's output times e^θ, and no gradient as large as its weight
    gains    γ' = γ · e^φ   (γ = 1 + w for a norm that multiplies by 1 + w)

Factors, so that one learning rate fits groups and channels of any size. (EfficientQAT, Chen 2024, section 3.3, trains Δ
end to end in the same way, not the gains.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from awqkit.numerics.grid import QuantizedWeight


class TunableLinear:
    """Codes with scales that a gradient can reach. log_change: θ `[out, groups]`, or `[out, 1]` for rows, a leaf.

    float32. tuning: "groups" or "rows". transposed: whether the parameter that `weight` stands for is `[in, out]`.
    """

    def __init__(self, quantized: QuantizedWeight, tuning: str, *, transposed: bool = False) -> None:
        self.per_row, self._transposed = tuning == "rows", transposed
        grid = quantized.grid
        rows, columns = quantized.codes.shape
        grouped = quantized.codes.reshape(rows, columns // grid.group_size, grid.group_size)
        self._grid, self._code_dtype = grid, quantized.codes.dtype
        steps = grouped.to(torch.float32) - grid.group_zero.unsqueeze(-1)
        self._steps = steps.to(torch.int8 if grid.bits < 8 else torch.int16)
        scale = grid.group_scale[:, :1] if self.per_row else grid.group_scale
        self._held: Tensor | None = None
        self.log_change = torch.zeros_like(scale, requires_grad=True)

    def weight(self) -> Tensor:
        """(q − z) Δ e^θ as the parameter is, float32, differentiable in θ; for rows without e^θ, see `scaled`."""
        if self._held is not None:
            return self._held
        scale = self._grid.group_scale
        if not self.per_row:
            scale = scale * self.log_change.exp()
        weight = (self._steps * scale.unsqueeze(-1)).flatten(1)
        return weight.t() if self._transposed else weight

    def hold(self) -> None:
        """Keep `weight` where it does not change: for rows."""
        if self.per_row:
            self._held = self.weight()

    def scaled(self, outputs: Tensor, bias: Tensor | None) -> Tensor:
        """What the linear gives, `[..., out]`, with rows at e^θ, from what it gives with them at 1; differentiable."""
        factor = self.log_change[:, 0].exp()
        return outputs * factor if bias is None else (outputs - bias) * factor + bias

    def finished(self, stored_dtype: torch.dtype) -> QuantizedWeight:
        """The same codes with the group scales as they will be stored."""
        grid = self._grid
        scale = (grid.group_scale * self.log_change.detach().exp()).to(stored_dtype).to(torch.float32)
        scale = torch.where((scale > 0) & (scale < torch.inf), scale, grid.group_scale)
        codes = (self._steps + grid.group_zero.unsqueeze(-1)).flatten(1).to(self._code_dtype)
        return QuantizedWeight(codes, replace(grid, group_scale=scale))


@dataclass(frozen=True, slots=True)
class TunableGain:
    """A vector γ that multiplies. value: as stored, float32; offset: 1 where γ = 1 + value, else 0."""

    value: Tensor
    offset: float
    log_change: Tensor

    @classmethod
    def of(cls, value: Tensor, *, is_offset: bool) -> TunableGain:
        """A gain that has not moved."""
        return cls(value, 1.0 if is_offset else 0.0, torch.zeros_like(value, requires_grad=True))

    def vector(self) -> Tensor:
        """γ e^φ, less the 1 of an offset norm; differentiable in φ."""
        return (self.value + self.offset) * self.log_change.exp() - self.offset

    def finished(self, stored_dtype: torch.dtype) -> Tensor:
        """The value as it will be stored, float32."""
        return self.vector().detach().to(stored_dtype).to(torch.float32)
