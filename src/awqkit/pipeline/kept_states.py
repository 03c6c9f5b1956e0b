"""bfloat16 tensors of the size of all hidden states: on the device where there is room, else in unlinked files."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_DEVICE_SHARE = 0.3  # of the free device memory


def kept_states(shapes: Sequence[torch.Size], device: torch.device) -> list[Tensor]:
    """One bfloat16 tensor per shape, without values yet; all of them in the same place."""
    needed_bytes = 2 * sum(shape.numel() for shape in shapes)
    if device.type == "cuda" and needed_bytes <= _DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
        return [torch.empty(shape, dtype=torch.bfloat16, device=device) for shape in shapes]
    return [_on_disk(shape, Path(tempfile.gettempdir())) for shape in shapes]


def _on_disk(shape: torch.Size, folder: Path) -> Tensor:
    """A tensor backed by a file that is gone when the process is."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".awqkit-states-") as file:
        return torch.from_file(file.name, shared=True, size=shape.numel(), dtype=torch.bfloat16).reshape(shape)
