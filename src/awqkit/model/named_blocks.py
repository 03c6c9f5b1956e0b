"""A model's blocks by their paths: wherever they lie, others can be put in their places."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn


class NamedBlocks:
    """The modules at `paths` of `model`, in order; what stands there now, which need not be what stood there before.

    where: what messages call them together.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], where: str) -> None:
        self._model = model
        self.paths, self.where = tuple(paths), where

    @classmethod
    def of_list(cls, model: nn.Module, path: str) -> NamedBlocks:
        """The modules of the list at `path`."""
        names = model.get_submodule(path)._modules
        return cls(model, [f"{path}.{name}".removeprefix(".") for name in names], path or "the module itself")

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[nn.Module]:
        return (self._model.get_submodule(path) for path in self.paths)

    def __getitem__(self, index: int) -> nn.Module:
        return self._model.get_submodule(self.paths[index])

    def put(self, modules: Sequence[nn.Module]) -> None:
        """Have these stand at the paths, in order."""
        parents: dict[str, nn.Module] = {}
        for path, module in zip(self.paths, modules, strict=True):
            parent, _, leaf = path.rpartition(".")
            if parent not in parents:
                parents[parent] = self._model.get_submodule(parent)
            parents[parent]._modules[leaf] = module  # not by setattr, which takes most of the time of a short forward
