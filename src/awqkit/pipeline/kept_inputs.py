"""The linear inputs of one block on the original stream, kept so that the quantized stream can be held against them.

Without them the original block would have to run again up to every input: a forward pass and a half more per block.
bfloat16, on the device where there is room, else in unlinked files; rounding x changes C by far less than the noise of
the calibration rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from awqkit.model.structure import LinearInput

_DEVICE_SHARE = 0.3  # of the free device memory


class KeptInputs:
    """`[rows, tokens, channels]` bfloat16 for every input, by its first reader."""

    def __init__(self, entries: Sequence[LinearInput], rows: int, tokens: int, device: torch.device) -> None:
        self._device = device
        shapes = {entry.first: torch.Size((rows, tokens, entry.num_channels)) for entry in entries}
        needed_bytes = 2 * sum(shape.numel() for shape in shapes.values())
        inside = device.type == "cuda" and needed_bytes <= _DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]
        folder = Path(tempfile.gettempdir())
        self._kept = {
            first: torch.empty(shape, dtype=torch.bfloat16, device=device) if inside else tensor_on_disk(shape, folder)
            for first, shape in shapes.items()
        }

    def keep(self, first: str, part: slice, inputs: Tensor) -> None:
        """Keep the inputs of some rows, `[rows, tokens, channels]` or with rows and tokens in one dimension."""
        place = self._kept[first][part]
        place.copy_(inputs.reshape(place.shape))

    def at(self, first: str, part: slice) -> Tensor:
        """The inputs of some rows, bfloat16 on the device."""
        return self._kept[first][part].to(self._device)


def tensor_on_disk(shape: torch.Size, folder: Path) -> Tensor:
    """A bfloat16 tensor backed by a file that is gone when the process is."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".awqkit-states-") as file:
        return torch.from_file(file.name, shared=True, size=shape.numel(), dtype=torch.bfloat16).reshape(shape)
