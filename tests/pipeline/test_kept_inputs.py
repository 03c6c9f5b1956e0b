"""Kept linear inputs are those of the original block, as bfloat16 holds them, and leave no file behind."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from tiny_contexts import CPU, block_context, current, hidden_states, token_ids
from tiny_models import tiny_model

from awqkit.pipeline import free_memory, kept_states
from awqkit.pipeline.kept_inputs import KeptInputs
from awqkit.pipeline.observe_block import observe
from awqkit.pipeline.stopped_rows import StoppedRows


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_they_are_what_the_block_run_again_gives(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    context, ids = block_context(tiny_model(family)), token_ids(5, 12)
    rows = hidden_states(context.skeleton, ids)
    before = rows.copy()
    kept = KeptInputs(context.structure.inputs, 5, 12, CPU)
    observe(context, rows, kept=kept)
    assert not torch.equal(current(rows), current(before))
    for entry in context.structure.inputs:
        ((part, expected, _),) = StoppedRows(context, before, wait=False).at(entry, {})
        assert torch.equal(kept.at(entry.first, part), expected.to(torch.bfloat16).reshape(5, 12, -1))
    assert not list(tmp_path.glob(".awqkit-*"))


@pytest.mark.parametrize(("host_bytes", "expected"), [(107, "pinned"), (106, "file")])
def test_where_a_gpu_has_no_room_its_host_keeps_them_and_else_a_file(
    host_bytes: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(free_memory, "free_bytes", lambda device: host_bytes if device.type == "cpu" else 0.0)
    monkeypatch.setattr(free_memory, "_torch_has", lambda device: (0, 0))

    def empty(shape: torch.Size, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        return torch.zeros(shape, dtype=dtype)

    file = torch.ones(2, 4, dtype=torch.bfloat16)
    monkeypatch.setattr(kept_states, "_on_disk", lambda shape, folder, dtype: file)
    with monkeypatch.context() as only_here:
        only_here.setattr(torch, "empty", empty)
        (kept,) = kept_states.kept_states([torch.Size((2, 4))], torch.device("cuda"))
    assert (kept is file) == (expected == "file")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_memory_gives_back_what_a_gpu_put_there() -> None:
    kept, device = torch.empty(64, 256, dtype=torch.bfloat16, pin_memory=True), torch.device("cuda")
    for part in (slice(0, 32), slice(32, 64)):
        values = torch.randn(32, 256, device=device)
        kept_states.put(kept[part], values)
        assert torch.equal(kept_states.taken(kept[part], device), values.to(torch.bfloat16))
