"""Linears that read one input, multiplied in one launch: the first computes all products, the others take theirs.

Not known here: who reads what, which `shared_inputs` finds out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from awqkit.kernels.int4_chunks import PackedChunks, can_join, joined_matmul


class JoinedProducts:
    """The weights of several linears as rows of one, and their products while a call of one module lasts.

    Products are given only to who brings the very tensor they were computed from, unchanged; whoever has another one,
    or comes before the first reader or after the last, computes alone. The module that holds all readers opens and
    closes: where the last reader did not come until then, products were computed in vain, and are not computed again.
    """

    def __init__(self, weights: Sequence[PackedChunks]) -> None:
        ends = torch.tensor([0, *(len(weight.words) for weight in weights)]).cumsum(0)
        self._ends: list[int] = ends.tolist()
        weight = PackedChunks(
            *(torch.cat([getattr(each, name) for each in weights]) for name in ("words", "scale", "zero"))
        )
        bounds = ends.to(weight.words.device, torch.int32)
        for held in (weight.words, weight.scale, weight.zero, bounds):
            # as for a module's buffers: a CUDA graph of torch.compile would copy them before each replay
            torch._dynamo.mark_static_address(held)
        self._held: tuple[PackedChunks, Tensor] | None = weight, bounds
        self._open = False
        self._kept: tuple[Tensor, int, Tensor] | None = None  # x, its version, products

    def rows_of(self, reader: int) -> tuple[Tensor, Tensor, Tensor]:
        """Words, Δ and z of one reader, views of those of all."""
        assert self._held is not None
        weight, rows = self._held[0], slice(self._ends[reader], self._ends[reader + 1])
        return weight.words[rows], weight.scale[rows], weight.zero[rows]

    def product(self, x: Tensor, reader: int) -> Tensor | None:
        """x · Wᵀ of one reader, contiguous, or None where it has to compute it alone."""
        held = self._held  # once: another thread may end this at any time
        if held is None or not self._open or not can_join(x):
            return None
        version = _version(x)
        if reader == 0:
            products = joined_matmul(x, *held)
        else:
            kept = self._kept
            if kept is None or kept[0] is not x or kept[1] != version:
                return None
            products = kept[2]
        last = reader + 2 == len(self._ends)
        self._kept = None if last else (x, version, products)
        rows, start, end = x.numel() // x.shape[-1], self._ends[reader], self._ends[reader + 1]
        return products[rows * start : rows * end].view(*x.shape[:-1], end - start)

    def open(self, *_: Any) -> None:
        """A forward pre-hook of the module that holds all readers."""
        self._open, self._kept = self._held is not None, None

    def close(self, *_: Any) -> None:
        """A forward hook of the same module."""
        if self._kept is not None:
            self.end()
        self._open = False

    def end(self) -> None:
        """Nothing is joined any more, and nothing held."""
        self._open, self._kept, self._held = False, None, None


def _version(x: Tensor) -> int:
    """How often x was changed in place, where that is counted: neither while it is traced nor in inference mode.

    There the pass in which readers were found must do, in which x was not changed between them.
    """
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
