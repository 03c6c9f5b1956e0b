"""What waits for the device cannot be captured as a CUDA graph; it is found before a capture that it would break."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


def replayed(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`work`, which does the same with the same tensors each time, as a CUDA graph; as it is where none can be had."""
    if device.type != "cuda":
        return work
    stream, usual, graph = torch.cuda.Stream(device), torch.cuda.current_stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(usual)
    try:
        with torch.cuda.device(device), torch.cuda.stream(stream):
            with waiting_refused():
                work()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                work()
    except Exception:  # whatever a model's own code does to break it
        return work
    usual.wait_stream(stream)
    return graph.replay
