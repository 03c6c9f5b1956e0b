"""The next block's tensors, read from the disk while the block before it computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from awqkit.checkpoint.tensor_source import TensorSource
from awqkit.model.skeleton import Skeleton

_THREADS = 2


class ReadAhead:
    """A context manager. For a GPU alone, to which tensors go from pinned memory: a CPU has no time to spare."""

    def __init__(self, source: TensorSource, skeleton: Skeleton, device: torch.device) -> None:
        self._source, self._skeleton = source, skeleton
        self._pool = ThreadPoolExecutor(_THREADS) if device.type == "cuda" else None
        self._asked: dict[str, Future[Tensor]] = {}

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def ask(self, index: int) -> None:
        """Begin to read a block, if there is one of that number."""
        if self._pool is None or index >= self._skeleton.num_blocks:
            return
        for name in self._skeleton.disk_names_of_block(index):
            if name not in self._asked:
                self._asked[name] = self._pool.submit(_pinned, self._source.read, name)

    def read(self, name: str) -> Tensor:
        """As `TensorSource.read`: what was asked for, or read now."""
        asked = self._asked.pop(name, None)
        return self._source.read(name) if asked is None else asked.result()


def _pinned(read: Callable[[str], Tensor], name: str) -> Tensor:
    return read(name).pin_memory()
