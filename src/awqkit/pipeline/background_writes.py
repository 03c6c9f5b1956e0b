"""Writing a finished block while the next one computes on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch


class BackgroundWrites:
    """A context manager for jobs that run one after the other in a thread of their own, at most one behind.

    What a job raises is raised by the next `start` or `wait`. A CPU runs a job at once: OpenMP keeps threads for every
    thread that calls it, and where those are more than cores each small operator takes twice as long.
    """

    def __init__(self, device: torch.device) -> None:
        self._pool = ThreadPoolExecutor(1) if device.type == "cuda" else None
        self._running: Future[None] | None = None

    def __enter__(self) -> BackgroundWrites:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def start(self, job: Callable[[], None]) -> None:
        """Run a job once the one before it is done."""
        self.wait()
        if self._pool is None:
            job()
        else:
            self._running = self._pool.submit(job)

    def wait(self) -> None:
        """Until everything is written."""
        running, self._running = self._running, None
        if running is not None:
            running.result()
