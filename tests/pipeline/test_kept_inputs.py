"""Kept linear inputs are those of the original block, as bfloat16 holds them, and leave no file behind."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from tiny_contexts import CPU, block_context, current, hidden_states, token_ids
from tiny_models import tiny_model

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
    assert not list(tmp_path.iterdir())
