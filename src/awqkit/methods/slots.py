"""All methods on one screen: the name of a choice in the Recipe -> the pure function that carries it out.

    channel scale   methods/fold.py     "none" | "search"                 per fold, before any linear
    grid            CLIP                "none" | "shared" | "ends"        per (row, group)
    rounding        ROUNDING            "nearest"                         per linear, on the grid
    refinement      comes after rounding, on its codes and the same objective
    propagation     comes before the grid, and changes the weight that is aimed at

A new rounding is a file in numerics/, a line here and a test.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from awqkit.numerics.clip import search_clip
from awqkit.numerics.grid import Grid, QuantizedWeight
from awqkit.numerics.rounding import round_nearest

CLIP: dict[str, Callable[..., tuple[Tensor, Tensor]] | None] = {
    "none": None,
    "shared": partial(search_clip, separate_ends=False),
    "ends": partial(search_clip, separate_ends=True),
}

ROUNDING: dict[str, Callable[[Tensor, Grid], QuantizedWeight]] = {
    "nearest": round_nearest,
}
