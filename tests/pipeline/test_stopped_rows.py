"""Rows that wait inside a block compute what rows that begin again compute, bit by bit, whatever was undone."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_contexts import CPU, block_context, current, hidden_states, quantized_blocks, token_ids
from tiny_models import tiny_model

from awqkit import Recipe
from awqkit.pipeline import free_memory, stopped_rows
from awqkit.pipeline.activations import HiddenStates, TokenRows
from awqkit.pipeline.context import BlockContext
from awqkit.pipeline.stopped_rows import StoppedRows

ROWS = token_ids(5, 12)


def _rows(context: BlockContext) -> HiddenStates:
    return HiddenStates(context.skeleton, TokenRows(ROWS), CPU, tokens_per_batch=24)  # three batches


def _linears(context: BlockContext, factor: float) -> dict[str, SimpleNamespace]:
    """Stands for quantized linears: other weights."""
    return {
        view.name: SimpleNamespace(restored=factor * context.weight(view.name)) for view in context.structure.linears
    }


def _before(context: BlockContext, linears: dict, position: int) -> dict:
    readers = {name for entry in context.structure.inputs[:position] for name in entry.readers}
    return {name: linear for name, linear in linears.items() if name in readers}


@pytest.mark.parametrize("family", ["llama", "phi3", "cohere", "gemma3"])
def test_waiting_and_beginning_again_are_the_same(family: str) -> None:
    context = block_context(tiny_model(family))
    rows = [_rows(context), _rows(context)]
    ways = [StoppedRows(context, each, wait=wait) for each, wait in zip(rows, (True, False), strict=True)]
    linears, others = _linears(context, 0.75), _linears(context, 1.5)
    entries = context.structure.inputs
    last = len(entries) - 1
    steps = [(position, linears) for position in range(len(entries))]
    steps += [(last, linears), (1, linears), (last, linears)]  # the same again, and back
    steps += [(position, others) for position in range(1, len(entries))]  # what was met is not what is in use now
    steps += [(1, linears), (last, others), (last - 1, linears)]
    for position, chosen in steps:
        waiting, again = (list(way.at(entries[position], _before(context, chosen, position))) for way in ways)
        assert [part for part, _, _ in waiting] == [part for part, _, _ in again]
        for (_, found, _), (_, expected, _) in zip(waiting, again, strict=True):
            assert torch.equal(found, expected)
    for way in ways:
        way.finish(others)
    assert torch.equal(current(rows[0]), current(rows[1]))
    assert not torch.equal(current(rows[0]), current(_rows(context)))


def test_what_was_met_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    context, counted = block_context(tiny_model("llama")), []
    hand_on = stopped_rows.hand_on

    def counting(*arguments):
        counted.append(None)
        return hand_on(*arguments)

    monkeypatch.setattr(stopped_rows, "hand_on", counting)
    threads = threading.active_count()
    rows = StoppedRows(context, _rows(context), wait=True)
    for entry in context.structure.inputs:
        list(rows.at(entry, {}))
    assert threading.active_count() == threads + 3
    rows.finish({})
    assert len(counted) == 3 and threading.active_count() == threads


def test_rows_that_are_let_go_on_their_way_leave_no_thread() -> None:
    context, threads = block_context(tiny_model("llama")), threading.active_count()
    rows = StoppedRows(context, _rows(context), wait=True)
    for _ in rows.at(context.structure.inputs[1], {}):
        break
    rows.close()
    assert threading.active_count() == threads


def test_they_wait_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    context = block_context(tiny_model("llama"))
    rows = hidden_states(context.skeleton, ROWS)
    needed = 4 * 5 * 12 * (rows.shape[2] + max(entry.num_channels for entry in context.structure.inputs))
    searching = context.memory.search + rows.tokens_per_batch * context.memory.token
    plenty = needed / 0.29 + searching
    assert needed / 0.31 < needed + searching - 1  # here what is spared for the search decides
    cases = ((plenty, True), (needed + searching - 1, False), (needed / 0.31, False), (None, False))
    for free, fits in cases:
        monkeypatch.setattr(free_memory, "free_bytes", lambda device, free=free: free)
        assert stopped_rows._fits(context, rows) is fits


@pytest.mark.parametrize("propagation", [0.5, "auto"])
def test_a_run_chooses_the_same_either_way(propagation: float | str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(Recipe.preset("balanced", group_size=32, generated=0.0), propagation=propagation)
    found = []
    for fits in (True, False):
        monkeypatch.setattr(stopped_rows, "_fits", lambda context, rows, fits=fits: fits)
        model = tiny_model("llama")
        found.append([result for _, result, _ in quantized_blocks(model, recipe, ROWS, token_ids(3, 12, seed=9))])
    for waiting, again in zip(*found, strict=True):
        assert waiting.decision == again.decision
        for name, weight in waiting.quantized.items():
            assert torch.equal(weight.codes, again.quantized[name].codes)
