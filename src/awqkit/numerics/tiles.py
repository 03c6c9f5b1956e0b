"""Cutting a weight into tiles, so that a search that visits a tile a hundred times finds it in cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

_TILE_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 27}  # three such of float32 fit a core's L2; a GPU wants large launches
_PRODUCT_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 27}
_TILE_ROWS = 1024  # on a CPU; a constant, so that sums over rows are in one order whatever the number of threads


def group_tiles(num_groups: int, group_size: int, num_rows: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Slices over groups and rows of a weight that together cover all of it."""
    if device.type == "cuda":
        rows, budget = num_rows, _TILE_ELEMENTS["cuda"]
    else:
        rows, budget = min(num_rows, _TILE_ROWS), _TILE_ELEMENTS["cpu"] * torch.get_num_threads()
    groups = max(1, budget // max(1, group_size * rows))
    for first in range(0, num_groups, groups):
        for start in range(0, num_rows, rows):
            yield slice(first, min(first + groups, num_groups)), slice(start, min(start + rows, num_rows))


def row_tiles(num_channels: int, num_rows: int, device: torch.device) -> Iterator[slice]:
    """Slices over the rows of a weight that together cover all of them, for what needs whole rows."""
    step = max(1, _TILE_ELEMENTS["cuda" if device.type == "cuda" else "cpu"] // num_channels)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def products_at_once(weight: torch.Tensor) -> int:
    """How many variants of a whole weight are made in one product: on a CPU one where the weight fills its cache."""
    return max(1, _PRODUCT_ELEMENTS["cuda" if weight.device.type == "cuda" else "cpu"] // weight.numel())
