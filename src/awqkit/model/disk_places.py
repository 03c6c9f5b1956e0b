"""Where the tensors of a checkpoint lie in the model: whole parameters, renamed ones, and slices of stacked ones.

No table of names: transformers' own way of saving is run on tensors without values, and what comes out of it are views
of what went in. Which slice of which parameter a tensor on disk is, can be read off the view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from awqkit.model.transformers_bridge import as_saved


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor on disk as a view of one parameter or buffer. stride, offset: in elements, from its start."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, whole: Tensor) -> Tensor:
        """The view of `whole`, which is contiguous and holds the parameter."""
        return whole.as_strided(self.shape, self.stride, whole.storage_offset() + self.offset)

    def rows_in(self, matrix: Place) -> slice | None:
        """Which whole rows, in equal steps, of `matrix`, a view of the same parameter, this is; None if it is not."""
        if len(self.shape) != 2 or self.shape[1:] != matrix.shape[1:] or self.stride[1] != matrix.stride[1]:
            return None
        first, rest = divmod(self.offset - matrix.offset, matrix.stride[0])
        step, uneven = divmod(self.stride[0], matrix.stride[0])
        if rest or uneven or first < 0 or first + (self.shape[0] - 1) * step >= matrix.shape[0]:
            return None
        return slice(first, first + (self.shape[0] - 1) * step + 1, step)


@dataclass(frozen=True, slots=True)
class DiskPlaces:
    """whole: model tensor -> its name on disk. slices: parameter -> its parts by name on disk, covering all of it."""

    whole: Mapping[str, str]
    slices: Mapping[str, Mapping[str, Place]]

    def disk_names(self, name: str) -> tuple[str, ...]:
        """Every tensor on disk that a parameter or buffer of the model comes from."""
        if name in self.whole:
            return (self.whole[name],)
        return tuple(self.slices.get(name, ()))


def places_on_disk(model: nn.Module, disk_names: Iterable[str]) -> DiskPlaces:
    """For every tensor of the model where it is on disk, if it is there.

    Its own name comes first, then what transformers saves it as; either with or without the base model's prefix (a
    checkpoint of the bare decoder).
    """
    available = set(disk_names)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."

    def spelled(name: str) -> str | None:
        return next((each for each in (name, name.removeprefix(prefix), prefix + name) if each in available), None)

    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    whole = {name: disk for name in tensors if (disk := spelled(name)) is not None}
    slices: dict[str, dict[str, Place]] = {}
    lost = {name: tensor for name, tensor in tensors.items() if name not in whole}
    for saved, (name, view) in (as_saved(model) if lost else {}).items():
        disk = spelled(saved)
        if name not in lost or disk is None:
            continue
        if view.shape == lost[name].shape and view.stride() == lost[name].stride():
            whole[name] = disk
        else:
            place = Place(tuple(view.shape), view.stride(), view.storage_offset())
            slices.setdefault(name, {})[disk] = place
    full = {
        name: parts
        for name, parts in slices.items()
        if name not in whole and sum(_size(part) for part in parts.values()) == lost[name].numel()
    }
    return DiskPlaces(whole, full)


def joined(
    parts: Mapping[str, Place],
    shape: torch.Size,
    read: Callable[[str], Tensor],
    device: torch.device | str = "cpu",
) -> Tensor:
    """A parameter of `shape` from its parts, on `device`; read(name): a tensor on disk, all of one dtype."""
    whole: Tensor | None = None
    for disk, place in parts.items():
        stored = read(disk)
        if whole is None:
            whole = torch.empty(shape, dtype=stored.dtype, device=device)
        place.of(whole).copy_(stored, non_blocking=True)
    assert whole is not None
    return whole


def _size(place: Place) -> int:
    count = 1
    for length in place.shape:
        count *= length
    return count
