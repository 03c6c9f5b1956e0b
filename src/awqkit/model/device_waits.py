"""What waits for the device cannot be captured as a CUDA graph; it is found before a capture that it would break."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def waiting_refused() -> Iterator[None]:
    """Inside, an operator that makes the host wait for a GPU raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
