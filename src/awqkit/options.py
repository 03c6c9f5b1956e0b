"""How a run is carried out. Nothing here changes the bytes that are written: that is the Recipe's part."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Device and manners of one run.

    device: "auto" (CUDA where there is one, else CPU), "cpu", "cuda" or "cuda:N".
    overwrite: replace OUT if it exists.
    trust_remote_code: run modelling code that the checkpoint brings along.
    save_every: seconds from one durable point of a run to the next, at least; 0 has one after every block.
    restart: throw away what a stopped run left, and begin anew.
    device_memory: GB (10⁹ bytes) of a CUDA device that tensors may take at most; None for all that is free.
    """

    device: str = "auto"
    overwrite: bool = False
    trust_remote_code: bool = False
    save_every: float = 60.0
    restart: bool = False
    device_memory: float | None = None
