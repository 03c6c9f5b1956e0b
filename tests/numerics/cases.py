"""Small linears whose input is correlated and has channels of very different size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from numerics.reference import meaning, per_column
from torch import Tensor

from awqkit.numerics.grid import Grid, QuantizedWeight
from awqkit.numerics.rounding import span_grid

BF16 = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Case:
    """weight `[out, in]`, inputs `[tokens, in]`, moment H `[in, in]`, all float32."""

    weight: Tensor
    inputs: Tensor
    moment: Tensor

    @property
    def energy(self) -> Tensor:
        """Mean square of the weight's columns, `[in]`."""
        return self.weight.square().mean(dim=0)

    def grid(self, bits: int = 4, group_size: int = 16, *, symmetric: bool = False) -> Grid:
        """The grid over each group's range."""
        return span_grid(self.weight, bits=bits, group_size=group_size, symmetric=symmetric, stored_dtype=BF16)


def correlated(rows: int, columns: int, *, tokens: int = 400, seed: int = 0, spread: float = 0.7) -> Case:
    """Inputs that are mixtures of a third as many sources, plus noise of their own."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mixed = noise(tokens, max(columns // 3, 1)) @ noise(max(columns // 3, 1), columns) / max(columns // 3, 1) ** 0.5
    inputs = (mixed + 0.3 * noise(tokens, columns)) * torch.exp(spread * noise(columns))
    weight = noise(rows, columns) * torch.exp(0.4 * noise(columns)) / columns**0.5
    return Case(weight, inputs, inputs.t() @ inputs / tokens)


def error_of(weight: Tensor, quantized: QuantizedWeight) -> Tensor:
    """Ŵ − W in float64."""
    grid = quantized.grid
    scale, zero = per_column(grid.group_scale, grid.group_size), per_column(grid.group_zero, grid.group_size)
    return meaning(quantized.codes, scale, zero) - weight.double()
