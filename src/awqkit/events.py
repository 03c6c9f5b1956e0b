"""What a long run tells whoever listens; the command line draws them, a program may log them.

An event is a plain value. Nothing here prints, and nothing in the library prints either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Notice:
    """A fact worth one line: what was chosen, what was used and what was left."""

    text: str


@dataclass(frozen=True, slots=True)
class Caution:
    """A fact that may hurt later, for example a tensor-parallel size that will not load."""

    text: str


@dataclass(frozen=True, slots=True)
class TaskStarted:
    """Long work begins; `total` counts steps, in the unit that `name` implies, `done` those of an earlier run."""

    name: str
    total: int
    done: int = 0


@dataclass(frozen=True, slots=True)
class TaskAdvanced:
    """`done` of `total` steps of the running task are finished; `detail` says what is under way."""

    name: str
    done: float
    detail: str = ""


@dataclass(frozen=True, slots=True)
class TaskFinished:
    """The running task is over."""

    name: str


@dataclass(frozen=True, slots=True)
class BlockFinished:
    """One block of `quantize` is packed. Errors are relative output errors, None without calibration."""

    index: int
    num_blocks: int
    seconds: float
    error_nearest: float | None
    error_chosen: float | None
    num_fallbacks: int


Event = Notice | Caution | TaskStarted | TaskAdvanced | TaskFinished | BlockFinished
Emit = Callable[[Event], None]


def ignore_events(event: Event) -> None:
    """The listener of whoever does not want to hear."""
