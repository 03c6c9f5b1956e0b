"""How long Triton compiles: once on a machine, after which every process finds the kernels on its disk."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch


class CompileClock:
    """Inside, Triton's own seconds of compiling kernels are added up; 0 where it has no one to tell (before 3.4)."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._knobs: Any = None
        if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
            import triton

            self._knobs = getattr(getattr(triton, "knobs", None), "compilation", None)

    def __enter__(self) -> CompileClock:
        if self._knobs is not None:
            self._before = getattr(self._knobs, "listener", None)
            self._knobs.listener = self._add
        return self

    def __exit__(self, *raised: object) -> None:
        if self._knobs is not None:
            self._knobs.listener = self._before

    def _add(self, *, times: Any, cache_hit: bool, **about: Any) -> None:
        if not cache_hit:
            self.seconds += times.total / 1e6
        if self._before is not None:
            self._before(times=times, cache_hit=cache_hit, **about)
