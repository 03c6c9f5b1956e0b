"""Cutting the rows of a weight into tiles, so that a search that visits a tile a hundred times finds it in cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

_TILE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 27}  # 1 MiB of float32 fits a core's L2; a GPU wants large launches


def row_tiles(grouped_shape: Sequence[int], device: torch.device) -> Iterator[slice]:
    """Slices over the rows of a `[groups, out, group_size]` weight that together cover all of them."""
    groups, rows, group_size = grouped_shape
    budget = _TILE_ELEMENTS["cuda" if device.type == "cuda" else "cpu"]
    step = max(1, budget // (groups * group_size))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def tries_at_once(tile: torch.Tensor) -> int:
    """How many variants of `tile` fit into one batch: one on a CPU, whose cache the tile fills, many on a GPU."""
    return max(1, _TILE_ELEMENTS["cuda" if tile.device.type == "cuda" else "cpu"] // tile.numel())
