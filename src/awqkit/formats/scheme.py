"""How all quantized linears of a checkpoint are stored, in the words of the Recipe; the same for every format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from awqkit.numerics.grid import QuantizedWeight
from awqkit.recipe import PER_CHANNEL, Recipe

SCALE_DTYPES = (torch.bfloat16, torch.float16)  # what readers compute in; they would round a float32 scale
_ANY_GROUP_SIZE = 128  # stands for a size that is still to be chosen: every format takes it


@dataclass(frozen=True, slots=True)
class Scheme:
    """bits: of a weight. group_size: inputs that share a scale, −1 for one group a row.

    symmetric: every zero point is 2^(bits − 1). Of a checkpoint that was read: no zero points are stored.
    activations: "none", or "int8" where inputs are rounded per token at run time.
    """

    bits: int
    group_size: int
    symmetric: bool
    activations: str = "none"

    @classmethod
    def of(cls, recipe: Recipe, group_size: int | None = None) -> Scheme:
        """The recipe's scheme. group_size: the one that was chosen, None while the recipe's own is not settled."""
        size = recipe.group_size if group_size is None else group_size
        return cls(recipe.bits, size or _ANY_GROUP_SIZE, recipe.symmetric, recipe.activations)

    @property
    def middle_code(self) -> int:
        """The zero point of a symmetric grid."""
        return 1 << (self.bits - 1)

    @property
    def groups_text(self) -> str:
        """The group size for people."""
        return "one group a row" if self.group_size == PER_CHANNEL else f"groups of {self.group_size}"

    def columns(self, in_features: int) -> int:
        """Columns of one group of a linear with so many inputs."""
        return in_features if self.group_size == PER_CHANNEL else self.group_size

    def refuse_other_grid(self, linear: str, weight: QuantizedWeight, stored_dtype: torch.dtype) -> None:
        """Raises ValueError where the weight is not on a grid of this scheme, or a Δ is not exact in `stored_dtype`.

        Readers would then compute with other weights than the ones that were measured.
        """
        grid, (_, in_features) = weight.grid, weight.codes.shape
        columns = self.columns(in_features)
        if grid.bits != self.bits or grid.group_size != columns or in_features != columns * grid.group_scale.shape[1]:
            raise ValueError(
                f"{linear}: a grid of {grid.bits} bits and groups of {grid.group_size} does not fit "
                f"{self.bits} bits and {self.groups_text}"
            )
        scale, zero = grid.group_scale.float(), grid.group_zero.float()
        checks = [scale.to(stored_dtype).float() == scale, zero.to(torch.uint8).float() == zero]
        checks += [zero == self.middle_code] if self.symmetric else []
        exact, whole, *middle = torch.stack([check.all() for check in checks]).tolist()  # one look at a device
        if not exact:
            raise ValueError(f"{linear}: a group scale is not exact in {stored_dtype}")
        if not whole:
            raise ValueError(f"{linear}: a zero point is not a whole number from 0 to {2**self.bits - 1}")
        if not all(middle):
            raise ValueError(f"{linear}: a zero point is not {self.middle_code}, and a symmetric scheme stores none")


@dataclass(frozen=True, slots=True)
class StoredConfig:
    """What config.json says of the quantized linears. kept: its list of those that are not quantized, as it is."""

    scheme: Scheme
    kept: tuple[str, ...]


def listed(items: Sequence[object]) -> str:
    """Items as people list them.

    >>> listed([128, 64, 32])
    '128, 64 and 32'
    """
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last
