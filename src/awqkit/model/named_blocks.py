"""A model's blocks by their paths: wherever they lie, others can be put in their places."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn


class NamedBlocks:
    """The modules at `paths` of `model`, in order; what stands there now, which need not be what stood there before."""

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self._model = model
        self.paths = tuple(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[nn.Module]:
        return (self._model.get_submodule(path) for path in self.paths)

    def __getitem__(self, index: int) -> nn.Module:
        return self._model.get_submodule(self.paths[index])

    def __setitem__(self, index: int, module: nn.Module) -> None:
        parent, _, leaf = self.paths[index].rpartition(".")
        setattr(self._model.get_submodule(parent), leaf, module)
