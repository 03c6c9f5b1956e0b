"""The disk while a block computes: what is read ahead, and what is written behind."""

from __future__ import annotations

import threading

import pytest
import torch
from tiny_contexts import block_context
from tiny_models import tiny_model
from torch import Tensor

from awqkit.pipeline import read_ahead
from awqkit.pipeline.background_writes import BackgroundWrites
from awqkit.pipeline.read_ahead import ReadAhead


class _Counted:
    """A source that notes which names were read, and by which thread."""

    def __init__(self) -> None:
        self.reads: list[tuple[str, int]] = []

    def read(self, name: str) -> Tensor:
        self.reads.append((name, threading.get_ident()))
        return torch.ones(1)


def test_a_job_that_failed_is_told_by_the_next_one_or_by_waiting() -> None:
    done: list[int] = []

    def fail() -> None:
        raise OSError("no space left")

    with BackgroundWrites(torch.device("cuda")) as writes:
        writes.start(lambda: done.append(1))
        writes.start(fail)
        with pytest.raises(OSError, match="no space left"):
            writes.start(lambda: done.append(2))
        writes.start(fail)
        with pytest.raises(OSError, match="no space left"):
            writes.wait()
        writes.start(lambda: done.append(3))
        writes.wait()
    assert done == [1, 3]


def test_a_cpu_writes_at_once_in_the_thread_that_computes() -> None:
    threads: list[int] = []
    with BackgroundWrites(torch.device("cpu")) as writes:
        writes.start(lambda: threads.append(threading.get_ident()))
        assert threads == [threading.get_ident()]


def test_a_block_is_read_once_and_by_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "_pinned", lambda read, name: read(name))
    skeleton, source = block_context(tiny_model("llama")).skeleton, _Counted()
    with ReadAhead(source, skeleton, torch.device("cuda")) as ahead:
        ahead.ask(1)
        ahead.ask(1)
        ahead.ask(skeleton.num_blocks)  # there is none
        names = skeleton.disk_names_of_block(1)
        assert names and all(name.startswith("model.layers.1.") for name in names)
        for name in names:
            ahead.read(name)
        ahead.read("model.layers.0.mlp.up_proj.weight")
    assert sorted(name for name, _ in source.reads) == sorted([*names, "model.layers.0.mlp.up_proj.weight"])
    here = threading.get_ident()
    assert {name for name, thread in source.reads if thread == here} == {"model.layers.0.mlp.up_proj.weight"}


def test_a_cpu_reads_when_it_is_asked_to() -> None:
    skeleton, source = block_context(tiny_model("llama")).skeleton, _Counted()
    with ReadAhead(source, skeleton, torch.device("cpu")) as ahead:
        ahead.ask(1)
        assert source.reads == []
