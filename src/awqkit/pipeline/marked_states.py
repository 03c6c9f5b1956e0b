"""Hidden states as they were when a block began, so that it can begin again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from awqkit.pipeline.free_memory import can_pin, is_spare

_DEVICE_SHARE = 0.02  # of the free memory: little enough to make no block run out that would not have without


class MarkedStates:
    """Rows of a `[rows, ...]` tensor, copied before they are overwritten for the first time.

    To the host, but where they are next to nothing beside what is free on the GPU that they lie on.
    """

    def __init__(self, states: Tensor, beside: dict[int, Any], device: torch.device) -> None:
        self._states, self._beside, self._device = states, dict(beside), device
        self._copied: dict[int, slice] = {}
        self._kept: Tensor | None = None

    def again(self, states: Tensor, beside: dict[int, Any]) -> MarkedStates:
        """A mark at what stands now; the memory of the copy is used again."""
        self._states, self._beside = states, dict(beside)
        self._copied.clear()
        return self

    def before_write(self, states: Tensor, part: slice) -> None:
        """Rows `part` of `states` are about to change. No-op where these are not the marked ones."""
        if states is not self._states or part.start in self._copied:
            return
        if self._kept is None:
            self._kept = self._place(states)
        self._kept[part].copy_(states[part], non_blocking=True)
        self._copied[part.start] = part

    def put_back(self) -> tuple[Tensor, dict[int, Any]]:
        """The states and what goes with them as they were at the mark."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if self._kept is not None:
            for part in self._copied.values():
                self._states[part].copy_(self._kept[part])
        self._copied.clear()
        self._kept = None  # what ran out may want its memory
        return self._states, dict(self._beside)

    def _place(self, states: Tensor) -> Tensor:
        if states.is_cuda and is_spare(states.nbytes, _DEVICE_SHARE, 0.0, states.device):
            return torch.empty_like(states)
        pinned = can_pin(states.nbytes, self._device)  # a copy to it does not wait for the device
        return torch.empty(states.shape, dtype=states.dtype, pin_memory=pinned)
