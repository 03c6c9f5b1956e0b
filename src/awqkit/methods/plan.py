"""LinearPlan: the Recipe resolved for one linear."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class LinearPlan:
    """What is to be done with one linear; `keep` is the reason for leaving it in full precision, or None.

    The grid fields are those of `numerics.grid.Grid`; clip, rounding and refinement are keys of `methods.slots`;
    error_weight, rounds: see `recipe.Recipe`.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    symmetric: bool
    stored_dtype: torch.dtype
    clip: str
    rounding: str
    error_weight: str = "moment"
    refinement: tuple[str, ...] = ()
    rounds: int = 0
    keep: str | None = None

    @property
    def grid_choices(self) -> dict[str, object]:
        """The keyword arguments that every grid function takes."""
        return {"bits": self.bits, "symmetric": self.symmetric, "stored_dtype": self.stored_dtype}

    @property
    def nameless(self) -> LinearPlan:
        """The same for every linear that the same is to be done with."""
        return replace(self, name="")

    @property
    def needs_factor(self) -> bool:
        """Whether any step looks at the factorised H."""
        return self.rounding != "nearest" or self.error_weight == "conditional" or self.rounds > 0
