"""Capturing work as a CUDA graph: on a stream of its own, after a run that shows what would break the capture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


@contextmanager
def waiting_refused() -> Iterator[None]:
    """Inside, an operator that makes the host wait for a GPU raises RuntimeError: it would break a capture."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def beside_usual_stream(device: torch.device, stream: torch.cuda.Stream | None = None) -> Iterator[None]:
    """Inside, work goes to another stream (a new one if none is given), after and before all on the usual one.

    It belongs around the whole of a capture: one that fails leaves its stream the current one.
    """
    stream, usual = stream or torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(usual)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield
    usual.wait_stream(stream)


def captured(work: Callable[[], Result], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Result]:
    """The work as a graph, captured on the current stream, and what it returned: a replay writes there again."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result = work()
    return graph, result


def replayed(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`work`, which does the same with the same tensors each time, as a CUDA graph; as it is where none can be had."""
    if device.type != "cuda":
        return work
    try:
        with beside_usual_stream(device):
            with waiting_refused():
                work()
            graph, _ = captured(work)
    except Exception:  # whatever a model's own code does to break it
        return work
    return graph.replay
