"""How long each stage of a run took."""

from __future__ import annotations

import time
from collections import defaultdict


class StageClock:
    """Adds up the wall time between stage names."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stage, self._since = "", time.monotonic()

    def enter(self, stage: str) -> None:
        """The stage before this one is over."""
        now = time.monotonic()
        if self._stage:
            self.seconds[self._stage] += now - self._since
        self._stage, self._since = stage, now
