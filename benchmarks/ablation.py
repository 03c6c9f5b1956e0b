"""What each part is worth: every part alone on plain rounding, and the presets with one part taken out or changed.

The names are rows of `quality.py`. The same variant under two names is measured once.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

NO_D: dict[str, Any] = {"importance": "mean-abs", "error_weight": "moment"}
TUNED: dict[str, Any] = {"tuning": "groups", "tuning_epochs": 4}
WITHOUT: dict[str, dict[str, Any]] = {
    "no-scales": {"channel_scale": "none"},
    "no-clip": {"clip": "none"},
    "no-d": NO_D,
    "nearest": {"rounding": "nearest"},
    "moment-order": {"column_order": "moment"},
    "no-descent": {"refinement": ("refit",)},
    "no-refit": {"refinement": ("descent",)},
    "no-refinement": {"refinement": (), "rounds": 0},
    "propagation-0": {"propagation": 0.0},
    "propagation-auto": {"propagation": "auto"},
    "text-only": {"generated": 0.0},
    "own-text-once": {"generated_weight": 1.0},
    "no-tuning": {"tuning_epochs": 0},
}
ALONE: dict[str, dict[str, Any]] = {
    "scales": {"channel_scale": "search"},
    "clip": {"clip": "ends"},
    "gptq": {"rounding": "gptq"},
    "gptq-moment-order": {"rounding": "gptq", "column_order": "moment"},
    "descent": {"refinement": ("descent",), "rounds": 1},
    "refit": {"refinement": ("refit",), "rounds": 1},
    "propagation": {"propagation": 0.5},
    "sensitivity": {"sensitivity": "end-loss"},
    "tuning": TUNED,
}
ABLATION: dict[str, dict[str, Any]] = {
    **{f"only-{part}": {"method": "rtn", **change} for part, change in ALONE.items()},
    "fast-d": {"quality": "fast", "importance": "conditional", "error_weight": "conditional"},
    "fast-generated": {"quality": "fast", "generated": 0.125},
    **{f"balanced-generated-{share}": {"quality": "balanced", "generated": share} for share in (0.25, 0.5)},
    **{f"balanced-{part}": {"quality": "balanced", **change} for part, change in WITHOUT.items()},
    **{f"balanced-propagation-{beta}": {"quality": "balanced", "propagation": beta} for beta in (0.25, 0.5, 0.75, 1.0)},
    "balanced-mean-damping": {"quality": "balanced", "damping": "mean"},
    "balanced-sensitivity": {"quality": "balanced", "sensitivity": "end-loss"},
    "balanced-tuning": {"quality": "balanced", **TUNED},
    **{f"best-rounds-{rounds}": {"quality": "best", "rounds": rounds} for rounds in (1, 4)},
    "best-no-sensitivity": {"quality": "best", "sensitivity": "none"},
    "best-no-tuning": {"quality": "best", "tuning_epochs": 0},
    "best-text-only": {"quality": "best", "generated": 0.0},
    **{f"best-rows-{what}": {"quality": "best"} for what in ("64-at-once", "384-at-once", "in-place")},
}


def rows_in_place(sensitivity: torch.Tensor) -> torch.Tensor:
    """The order of the rows as they stand, for `awqkit.numerics.rounding_metric.moment_order`."""
    return torch.arange(len(sensitivity), device=sensitivity.device)


# What is no choice of a recipe: row of the table -> dotted name -> what stands there while it is measured.
REPLACED: dict[str, dict[str, Any]] = {
    "best-rows-64-at-once": {"awqkit.methods.rows.ROWS_AT_ONCE": 64, "awqkit.methods.rows.MOST_BLOCKS": 1000},
    "best-rows-384-at-once": {"awqkit.methods.rows.ROWS_AT_ONCE": 384},
    "best-rows-in-place": {"awqkit.methods.rows.moment_order": rows_in_place},
}


@contextmanager
def replaced(values: Mapping[str, Any]) -> Iterator[None]:
    """Inside, the modules' names hold `values`. Raises AttributeError where a module has no such name."""
    places = [(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in values]
    before = [getattr(module, name) for module, name in places]
    try:
        for (module, name), value in zip(places, values.values(), strict=True):
            setattr(module, name, value)
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)
