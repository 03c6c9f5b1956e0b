"""Tensors to start from, by name: those of a model folder, or those that a program holds already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor


class TensorSource(Protocol):
    """What a run reads; `checkpoint.reader.Checkpoint` documents each. derived, hidden: tensors that were low-bit."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def total_bytes(self) -> int: ...

    @property
    def derived(self) -> Mapping[str, Any]: ...

    @property
    def hidden(self) -> Mapping[str, str]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def stored_bytes(self, name: str) -> int: ...

    def read(self, name: str) -> Tensor: ...


class HeldTensors:
    """Tensors in memory as a TensorSource. They are referred to, not copied, until one is read."""

    derived: Mapping[str, Any] = {}
    hidden: Mapping[str, str] = {}

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in the order given."""
        return tuple(self._tensors)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.stored_bytes(name) for name in self._tensors)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of tensor `name`."""
        return self._tensors[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`."""
        return tuple(self._tensors[name].shape)

    def stored_bytes(self, name: str) -> int:
        """Bytes of tensor `name`."""
        return self._tensors[name].numel() * self._tensors[name].dtype.itemsize

    def read(self, name: str) -> Tensor:
        """Tensor `name` on the CPU, in its dtype, in memory of its own: whoever reads may write to it."""
        return self._tensors[name].detach().to("cpu", copy=True).contiguous()
