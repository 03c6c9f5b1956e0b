"""Ctrl-C and SIGTERM end a run alike: the stack unwinds, and whoever holds temporary output removes it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived. A KeyboardInterrupt, so that what cleans up after Ctrl-C cleans up after this too."""


@contextmanager
def unwind_on_signals() -> Iterator[None]:
    """Within the block SIGINT raises KeyboardInterrupt and SIGTERM raises Terminated.

    The second signal is ignored: people press Ctrl-C twice, and that must not stop the cleaning up; a
    third one raises again. A signal that is ignored already (nohup, background jobs) stays ignored. Does
    nothing outside the main thread, where Python allows no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received = 0

    def unwind(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received += 1
        if received != 2:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    previous = {number: handler for number, handler in previous.items() if handler not in (signal.SIG_IGN, None)}
    for number in previous:
        signal.signal(number, unwind)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
