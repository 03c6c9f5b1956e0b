"""How long each stage of a run took."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable


class StageClock:
    """Adds up the wall time between stage names. settle: called before the time is looked at.

    A device works on after it was told what to do; who wants to know of which stage its time was waits there.
    """

    def __init__(self, settle: Callable[[], None] = lambda: None) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._settle = settle
        self._stage, self._since = "", time.monotonic()

    def enter(self, stage: str) -> None:
        """The stage before this one is over."""
        self._settle()
        now = time.monotonic()
        if self._stage:
            self.seconds[self._stage] += now - self._since
        self._stage, self._since = stage, now
