"""Hidden states as they were when a block began, so that it can begin again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class MarkedStates:
    """Rows of a `[rows, ...]` tensor, copied to the host before they are overwritten for the first time."""

    def __init__(self, states: Tensor, beside: dict[int, Any], device: torch.device) -> None:
        self._states, self._beside, self._device = states, dict(beside), device
        self._copied: dict[int, slice] = {}
        self._host: Tensor | None = None

    def again(self, states: Tensor, beside: dict[int, Any]) -> MarkedStates:
        """A mark at what stands now; the memory on the host is used again."""
        self._states, self._beside = states, dict(beside)
        self._copied.clear()
        return self

    def before_write(self, states: Tensor, part: slice) -> None:
        """Rows `part` of `states` are about to change. No-op where these are not the marked ones."""
        if states is not self._states or part.start in self._copied:
            return
        if self._host is None:
            pinned = self._device.type == "cuda"  # a copy to it does not wait for the device
            self._host = torch.empty(states.shape, dtype=states.dtype, pin_memory=pinned)
        self._host[part].copy_(states[part], non_blocking=True)
        self._copied[part.start] = part

    def put_back(self) -> tuple[Tensor, dict[int, Any]]:
        """The states and what goes with them as they were at the mark."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if self._host is not None:
            for part in self._copied.values():
                self._states[part].copy_(self._host[part])
        self._copied.clear()
        return self._states, dict(self._beside)
