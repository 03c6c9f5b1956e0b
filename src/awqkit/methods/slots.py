"""All methods on one screen: the name of a choice in the Recipe -> the pure function that carries it out.

    channel scale   methods/fold.py     "none" | "search" | "smooth"      per fold, before any linear
    propagation     methods/evidence.py 0 … 1 | "auto"                    per linear input: the weight that is aimed at
    grid            CLIP                "none" | "shared" | "ends"        per (row, group)
    rounding        ROUNDING            "nearest" | "gptq"                per linear, on the grid
    refinement      REFINEMENT          "descent", "refit"                in turn, on codes and grid, same objective
    sensitivity     methods/rows.py     "none" | "end-loss"               blocks of rows, errors fed to later rows

A new rounding is a file in numerics/, a line here and a test.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from awqkit.numerics.clip import search_clip
from awqkit.numerics.descent import descend
from awqkit.numerics.gptq import round_gptq
from awqkit.numerics.grid import Grid, QuantizedWeight
from awqkit.numerics.refit import refit
from awqkit.numerics.rounding import round_nearest
from awqkit.numerics.rounding_metric import RoundingMetric

CLIP: dict[str, Callable[..., tuple[Tensor, Tensor]] | None] = {
    "none": None,
    "shared": partial(search_clip, separate_ends=False),
    "ends": partial(search_clip, separate_ends=True),
}


def _nearest(weight: Tensor, grid: Grid, metric: RoundingMetric | None) -> QuantizedWeight:
    return round_nearest(weight, grid)


def _descent(
    weight: Tensor, quantized: QuantizedWeight, metric: RoundingMetric, stored_dtype: torch.dtype
) -> QuantizedWeight:
    return descend(weight, quantized, metric)


ROUNDING: dict[str, Callable[[Tensor, Grid, RoundingMetric], QuantizedWeight]] = {
    "nearest": _nearest,
    "gptq": round_gptq,
}

REFINEMENT: dict[str, Callable[[Tensor, QuantizedWeight, RoundingMetric, torch.dtype], QuantizedWeight]] = {
    "descent": _descent,
    "refit": refit,
}
