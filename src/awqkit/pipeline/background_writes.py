"""Writing a finished block while the next one computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundWrites:
    """A context manager for jobs that run one after the other in a thread of their own, at most one behind.

    What a job raises is raised by the next `start` or `wait`.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None

    def __enter__(self) -> BackgroundWrites:
        return self

    def __exit__(self, *raised: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def start(self, job: Callable[[], None]) -> None:
        """Run a job once the one before it is done."""
        self.wait()
        self._running = self._pool.submit(job)

    def wait(self) -> None:
        """Until everything is written."""
        running, self._running = self._running, None
        if running is not None:
            running.result()
