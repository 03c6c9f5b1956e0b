"""The disk while a block computes: what is read ahead, and what is written behind."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_contexts import block_context
from tiny_models import save_tiny, tiny_model, token_rows
from torch import Tensor

import awqkit.pipeline.run as pipeline_run
from awqkit import Recipe, RunOptions, quantize
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


def test_a_block_that_waits_to_be_written_holds_no_weights_and_a_written_one_no_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU whose disk is slow: else a block would need the memory of the one before as well."""
    waiting: list[Callable[[], None]] = []
    quantize_block = pipeline_run.quantize_block
    weights: list[weakref.ref[Tensor]] = []
    codes: list[weakref.ref[Tensor]] = []

    def one_behind(self: BackgroundWrites, job: Callable[[], None]) -> None:
        self.wait()
        waiting.append(job)

    def wait(self: BackgroundWrites) -> None:
        while waiting:
            waiting.pop()()

    def watched(context: Any, *rest: Any) -> Any:
        assert not any(each() is not None for each in weights)
        if context.index == 1:
            wait(None)  # type: ignore[arg-type]
            assert codes and not any(each() is not None for each in codes)
        result = quantize_block(context, *rest)
        weights.extend(weakref.ref(each) for each in context.parameters.values())
        codes.extend(weakref.ref(each.codes) for each in result.quantized.values())
        return result

    save_tiny(tiny_model("llama"), tmp_path / "source")
    monkeypatch.setattr(BackgroundWrites, "start", one_behind)
    monkeypatch.setattr(BackgroundWrites, "wait", wait)
    monkeypatch.setattr(pipeline_run, "quantize_block", watched)
    gc.disable()  # what only a collection would free stays on the device meanwhile
    try:
        quantize(
            tmp_path / "source", tmp_path / "out", Recipe.preset("fast", group_size=32),
            calibration=token_rows(18, 24), options=RunOptions(device="cpu"),
        )  # fmt: skip
    finally:
        gc.enable()
    assert len(codes) == 2 * 7
