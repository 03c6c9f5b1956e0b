"""The linear inputs of one block on the original stream, kept so that the quantized stream can be held against them.

Without them the original block would have to run again up to every input: a forward pass and a half more per block.
In bfloat16: rounding x changes C by far less than the noise of the calibration rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from awqkit.model.structure import LinearInput
from awqkit.pipeline.kept_states import kept_states


class KeptInputs:
    """`[rows, tokens, channels]` bfloat16 for every input, by its first reader."""

    def __init__(self, entries: Sequence[LinearInput], rows: int, tokens: int, device: torch.device) -> None:
        self._device = device
        shapes = [torch.Size((rows, tokens, entry.num_channels)) for entry in entries]
        kept = kept_states(shapes, device)
        self._kept = {entry.first: states for entry, states in zip(entries, kept, strict=True)}

    def keep(self, first: str, part: slice, inputs: Tensor) -> None:
        """Keep the inputs of some rows, `[rows, tokens, channels]` or with rows and tokens in one dimension."""
        place = self._kept[first][part]
        place.copy_(inputs.reshape(place.shape))

    def at(self, first: str, part: slice) -> Tensor:
        """The inputs of some rows, bfloat16 on the device."""
        return self._kept[first][part].to(self._device)
