"""Tensors of the size of all hidden states: on the device where there is room, on its host, else in unlinked files."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from awqkit.checkpoint.output import refuse_full_disk
from awqkit.model.block_calls import Carried, leaves, mapped
from awqkit.pipeline.free_memory import can_pin, is_spare

SCRATCH = "temporary files of the run (TMPDIR) need"
_DEVICE_SHARE = 0.3  # of the free device memory


def kept_states(
    shapes: Sequence[torch.Size], device: torch.device, dtype: torch.dtype = torch.bfloat16, reserved: float = 0.0
) -> list[Tensor]:
    """One tensor per shape, without values yet; all of them in the same place. Raises OutputError for a full disk.

    reserved: bytes that are to stay free on a GPU.
    """
    needed_bytes = dtype.itemsize * sum(shape.numel() for shape in shapes)
    if device.type == "cuda" and is_spare(needed_bytes, _DEVICE_SHARE, reserved, device):
        return [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
    if can_pin(needed_bytes, device):
        return [torch.empty(shape, dtype=dtype, pin_memory=True) for shape in shapes]
    folder = Path(tempfile.gettempdir())
    refuse_full_disk(folder, needed_bytes, SCRATCH)  # else writing to the mapped file would end the process
    return [_on_disk(shape, folder, dtype) for shape in shapes]


def put(kept: Tensor, values: Tensor) -> None:
    """Put values from a device in the place of kept ones. A copy to pinned memory is done when the device is."""
    kept.copy_(values, non_blocking=kept.is_pinned())


def taken(kept: Tensor, device: torch.device) -> Tensor:
    """Kept values on the device that put them there."""
    return kept.to(device, non_blocking=kept.is_pinned())


def on_host(values: Tensor) -> Tensor:
    """A copy on the host, pinned where that is possible."""
    if not can_pin(values.nbytes, values.device):
        return values.cpu()
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values)


def _on_disk(shape: torch.Size, folder: Path, dtype: torch.dtype) -> Tensor:
    """A tensor backed by a file that is gone when the process is."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".awqkit-states-") as file:
        return torch.from_file(file.name, shared=True, size=shape.numel(), dtype=dtype).reshape(shape)


class KeptBeside:
    """What goes with the hidden states of all rows between two blocks, every tensor in its own dtype."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._num_rows, self._device = num_rows, device
        self._form: tuple[Carried, ...] = ()
        self._kept: list[Tensor] | None = None

    def keep(self, part: slice, beside: tuple[Carried, ...]) -> None:
        """Keep what goes with some rows; the same tensors as with every other row."""
        tensors = leaves(list(beside))
        if self._kept is None:
            self._form = mapped(beside, lambda tensor: tensor[:0])
            shapes = [(torch.Size((self._num_rows, *tensor.shape[1:])), tensor.dtype) for tensor in tensors]
            self._kept = [kept_states([shape], self._device, dtype)[0] for shape, dtype in shapes]
        for kept, tensor in zip(self._kept, tensors, strict=True):
            put(kept[part], tensor)

    def at(self, part: slice) -> tuple[Carried, ...]:
        """What goes with some rows, on the device."""
        kept = iter(self._kept or ())
        return mapped(self._form, lambda _: taken(next(kept)[part], self._device))
