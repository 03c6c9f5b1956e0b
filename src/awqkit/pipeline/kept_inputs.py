"""The linear inputs of one block on the original stream, kept so that the quantized stream can be held against them.

Without them the original block would have to run again up to every input: a forward pass and a half more per block.
In bfloat16: rounding x changes C by far less than the noise of the calibration rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from awqkit.model.structure import LinearInput
from awqkit.pipeline.kept_states import kept_states, put, taken
from awqkit.pipeline.ranks import Ranks


class KeptInputs:
    """`[rows, tokens, channels]` bfloat16 for every input, by its first reader. reserved: as `kept_states` takes it."""

    def __init__(
        self, entries: Sequence[LinearInput], rows: int, tokens: int, device: torch.device, reserved: float = 0.0
    ) -> None:
        self._device = device
        shapes = [torch.Size((rows, tokens, entry.num_channels)) for entry in entries]
        kept = kept_states(shapes, device, reserved=reserved)
        self._kept = {entry.first: states for entry, states in zip(entries, kept, strict=True)}
        self._latest: dict[str, Tensor] = {}
        self._source: dict[str, str] = {}

    def keep(self, first: str, part: slice, inputs: Tensor) -> None:
        """Keep the inputs of some rows, `[rows, tokens, channels]` or with rows and tokens in one dimension."""
        place = self._kept[first][part]
        put(place, inputs.reshape(place.shape))
        self._latest[first] = inputs

    def find_source(self, experts: str, picked: Tensor, numbers: Tensor) -> None:
        """Find which of the inputs that were just kept has the rows `numbers` that these experts picked."""
        if experts in self._source:
            return
        for first, inputs in reversed(self._latest.items()):
            tokens = inputs.reshape(-1, inputs.shape[-1])
            if tokens.shape[-1] == picked.shape[-1] and torch.equal(tokens[numbers], picked):
                self._source[experts] = first
                return

    def source_of(self, experts: str) -> str | None:
        """The first reader of the tensor that experts pick their rows from, or None where none was found."""
        return self._source.get(experts)

    def agree_on_sources(self, ranks: Ranks) -> None:
        """Have on every rank the sources that the first one found, so that all compute the same."""
        self._source = ranks.told(self._source)

    def let_go(self) -> None:
        """Hold no inputs beyond the run of the block that they are from."""
        self._latest.clear()

    def at(self, first: str, part: slice) -> Tensor:
        """The inputs of some rows, bfloat16 on the device."""
        return taken(self._kept[first][part], self._device)
