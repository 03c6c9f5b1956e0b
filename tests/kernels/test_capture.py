"""What is replayed as a CUDA graph, and what is not."""

from __future__ import annotations

import pytest
import torch

from awqkit.errors import first_error
from awqkit.kernels.capture import replayed

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def test_a_cpu_does_the_work_itself() -> None:
    work = object.__repr__
    assert replayed(work, torch.device("cpu")) is work  # type: ignore[arg-type]


@needs_cuda
def test_a_gpu_replays_it() -> None:
    device, calls = torch.device("cuda"), []
    total = torch.zeros((), device=device)

    def work() -> None:
        calls.append(None)
        total.add_(1.0)

    again = replayed(work, device)
    met, before = len(calls), float(total)
    again()
    again()
    assert (len(calls), float(total)) == (met, before + 2.0)


@needs_cuda
def test_what_waits_for_a_gpu_is_done_as_it_is() -> None:
    device = torch.device("cuda")
    total, stream = torch.ones((), device=device), torch.cuda.current_stream()

    def work() -> float:
        return float(total)

    assert replayed(work, device) is work
    assert torch.cuda.current_stream() == stream and torch.cuda.get_sync_debug_mode() == 0


def test_of_errors_on_the_way_out_of_one_another_the_first_counts() -> None:
    with pytest.raises(ValueError) as caught:
        try:
            raise KeyError("first")
        finally:
            raise ValueError("last")
    assert str(first_error(caught.value)) == "'first'"
