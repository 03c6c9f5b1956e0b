"""Tuning of scales and gains: at rest it is the quantized model, it lowers the KL, and what is no help is put back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_contexts import (
    CPU,
    GROUP,
    block_context,
    current,
    hidden_states,
    quantized_blocks,
    run_on,
    token_ids,
    written,
)
from tiny_models import MLP_WIDTH, WIDTH, tiny_model
from torch import Tensor

from awqkit import Recipe
from awqkit.api.load import load
from awqkit.events import Caution
from awqkit.methods.tuning import TunableLinear
from awqkit.model.block_calls import BlockCall, Handed, run_block
from awqkit.model.skeleton import Skeleton
from awqkit.numerics.divergence import token_kl
from awqkit.numerics.grid import dequantize
from awqkit.pipeline import tune as tune_module
from awqkit.pipeline import tuning_stage
from awqkit.pipeline.activations import TokenRows
from awqkit.pipeline.captured_pass import BlocksPass
from awqkit.pipeline.tunable_block import TunableBlock, kept_bytes
from awqkit.pipeline.tune import STEPPING, Head, Stepping, TuningRows, tune
from awqkit.pipeline.tuning_stage import tunable_block

GPT2 = {"model_type": "gpt2", "n_inner": MLP_WIDTH}  # its weights are turned
RECIPE = Recipe.preset("fast", group_size=GROUP, bits=3, format="compressed-tensors")


@pytest.mark.parametrize("tuning", STEPPING)
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2"])
def test_at_rest_a_tunable_block_computes_what_was_quantized(family: str, tuning: str) -> None:
    ids = token_ids(4, 12)
    for context, result, _ in quantized_blocks(_model(family), replace(RECIPE, tuning=tuning), ids):
        skeleton, index = context.skeleton, context.index
        _, hidden, calls, _ = hidden_states(skeleton, ids).batch(0)
        tunable = tunable_block(context, result)
        found = tunable(hidden, calls[index]).hidden
        parameters = dict(context.block.named_parameters())
        for name, value in result.stored.items():
            parameters[name].data = value
        for name, weight in result.quantized.items():
            view = context.structure.linear(name)
            parameters[view.weight].data = view.oriented(dequantize(weight.codes, weight.grid))
        torch.testing.assert_close(found, run_block(context.block, hidden, calls[index]))
        assert tunable.gains  # norms that folds use
        assert not set(tunable.fixed) & (set(tunable.linears) | set(tunable.gains))
        break


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_rows_that_moved_are_the_stored_weights_whose_scales_moved(family: str) -> None:
    """Outputs times a factor, biases and turned weights included, are what the written block will compute."""
    ids = token_ids(4, 12)
    context, result, _ = next(iter(quantized_blocks(_model(family), replace(RECIPE, tuning="rows"), ids)))
    _, hidden, calls, _ = hidden_states(context.skeleton, ids).batch(0)
    tunable = tunable_block(context, result)
    for number, linear in enumerate(tunable.linears.values()):
        linear.log_change.data += 0.2 * torch.randn(linear.log_change.shape, generator=_generator(number))
    stored = {
        name: TunableLinear(linear.finished(torch.float32), "groups", transposed=tunable.views[name].transposed)
        for name, linear in tunable.linears.items()
    }
    expected = replace(tunable, linears=stored)(hidden, calls[0]).hidden
    torch.testing.assert_close(tunable(hidden, calls[0]).hidden, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tuning", STEPPING)
def test_what_is_computed_again_has_the_same_gradients(tuning: str) -> None:
    ids = token_ids(4, 12)
    context, result, _ = next(iter(quantized_blocks(tiny_model("llama"), replace(RECIPE, tuning=tuning), ids)))
    _, hidden, calls, _ = hidden_states(context.skeleton, ids).batch(0)
    found = []
    for recompute in (False, True):
        block = tunable_block(context, result)
        block(hidden, calls[0], recompute=recompute).hidden.square().sum().backward()
        found.append([leaf.grad for leaf in block.leaves])
    for kept, again in zip(*found, strict=True):
        assert torch.equal(kept, again)
        assert bool(kept.any())


@pytest.mark.parametrize("tuning", STEPPING)
def test_what_a_block_keeps_for_its_gradients_is_counted_once(tuning: str) -> None:
    """Its weights, and of the activations at least the inputs of the MLP and its down projection."""
    ids, found = token_ids(4, 12), []
    context, result, _ = next(iter(quantized_blocks(tiny_model("llama"), replace(RECIPE, tuning=tuning), ids)))
    block = tunable_block(context, result)
    for rows in (2, 4):
        _, hidden, calls, _ = hidden_states(context.skeleton, ids[:rows]).batch(0)
        found.append(kept_bytes(block, hidden, calls[0]))
    weights = 4 * sum(weight.codes.numel() for weight in result.quantized.values())
    per_row = (found[1] - found[0]) / 2
    assert weights <= found[1] - 4 * per_row < 1.5 * weights
    assert per_row > 4 * ids.shape[1] * (WIDTH + MLP_WIDTH)


def test_counting_it_leaves_no_graph_behind() -> None:
    """What is left would hold activations, and tie later captures to the stream it was made on."""
    ids, node_of = token_ids(2, 12), lambda leaf: torch.autograd.graph.get_gradient_edge(leaf).node
    context, result, _ = next(iter(quantized_blocks(tiny_model("llama"), RECIPE, ids)))
    block = tunable_block(context, result)
    _, hidden, calls, _ = hidden_states(context.skeleton, ids).batch(0)

    def marked(hidden: Tensor, call: BlockCall) -> Handed:
        found = block(hidden, call)
        node_of(block.leaves[0]).metadata["met"] = True
        return found

    kept_bytes(marked, hidden, calls[0])
    assert "met" not in node_of(block.leaves[0]).metadata


def test_part_of_an_epoch_visits_batches_evenly() -> None:
    visits = tune_module._visits(8, 0.5, _generator(0))
    assert sorted(visits) == [0, 2, 4, 6]
    assert visits != sorted(visits)
    visits = tune_module._visits(8, 1.25, _generator(0))
    assert sorted(visits[:8]) == list(range(8))
    assert sorted(visits[8:]) == [0, 4]
    assert tune_module._visits(3, 0.01, _generator(0)) == [0]
    for count, epochs in ((8, 0.5), (8, 1.25), (3, 0.01), (7, 0.3), (8, 1)):
        assert tune_module.visited(count, epochs) == set(tune_module._visits(count, epochs, _generator(0)))


def test_batches_that_no_step_looks_at_are_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton, begun = block_context(tiny_model("llama")).skeleton, []
    record = skeleton._record
    monkeypatch.setattr(skeleton, "_record", lambda ids, mask: begun.append(ids) or record(ids, mask))
    ids = token_ids(8, 512)
    start = tuning_stage.start_tuning(skeleton, "rows", (0.25, 0.5), TokenRows(ids), None, CPU)
    assert [start.calibration.batch(position)[0] for position in (0, 2)] == [slice(0, 2), slice(4, 6)]
    assert torch.equal(torch.cat(begun), torch.cat([ids[:2], ids[4:6]])) and len(begun) == 2
    everything = hidden_states(skeleton, ids)
    assert torch.equal(start.calibration.rows_of(slice(4, 6)), everything.rows_of(slice(4, 6)))


def _model(family: str) -> Any:
    return tiny_model("llama", **GPT2) if family == "gpt2" else tiny_model(family)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _quantized(ids: Tensor, tuning: str = "groups") -> tuple[Skeleton, list[TunableBlock], TuningRows]:
    blocks, skeleton, last = [], None, None
    for context, result, streams in quantized_blocks(tiny_model("llama"), replace(RECIPE, tuning=tuning), ids):
        blocks.append(tunable_block(context, result))
        skeleton, last = context.skeleton, streams.calibration.original
    assert skeleton is not None
    assert last is not None
    return skeleton, blocks, TuningRows(TokenRows(ids), hidden_states(skeleton, ids), last)


def _tune(
    skeleton: Skeleton,
    blocks: list[TunableBlock],
    rows: TuningRows,
    epochs: float,
    stepping: Stepping = STEPPING["groups"],
) -> tuple[float, float]:
    told = []

    def step(done: int, total: int) -> None:
        told.append((done, total))

    before, after = tune(skeleton, blocks, rows, rows, epochs=epochs, stepping=stepping, seed=0, device=CPU, step=step)
    assert told[-1][0] == told[-1][1] == len(told)
    assert before is not None
    assert after is not None
    return before, after


@pytest.mark.parametrize("tuning", STEPPING)
def test_tuning_lowers_the_kl_and_its_first_figure_is_the_quantized_models(tuning: str) -> None:
    ids = token_ids(8, 24)
    skeleton, blocks, rows = _quantized(ids, tuning)
    with skeleton.head(CPU) as head, torch.no_grad():
        _, hidden, calls, _ = rows.first.batch(0)
        for block, call in zip(blocks, calls, strict=True):
            hidden = block(hidden, call).hidden
        expected = float(token_kl(head(ids, current(rows.last), None), head(ids, hidden, None)).mean())
    before, after = _tune(skeleton, blocks, rows, 30, STEPPING[tuning])
    assert before == pytest.approx(expected, rel=1e-4)
    assert after < 0.98 * before
    assert any(float(leaf.detach().abs().max()) > 1e-3 for block in blocks for leaf in block.leaves)


def test_what_held_out_rows_do_not_like_is_put_back() -> None:
    ids = token_ids(8, 24)
    skeleton, blocks, rows = _quantized(ids)
    before, after = _tune(skeleton, blocks, rows, 2, replace(STEPPING["groups"], learning_rate=3.0))
    assert not after < before
    assert all(float(leaf.detach().abs().max()) == 0 for block in blocks for leaf in block.leaves)


def test_steps_that_cannot_be_captured_go_on_and_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlocksPass, "capture", lambda *given: "it waits for the device")
    skeleton, blocks, rows = _quantized(token_ids(8, 24), "rows")
    said: list[str] = []
    tune(
        skeleton, blocks, rows, None, epochs=5, stepping=STEPPING["rows"], seed=0, device=CPU,
        step=lambda done, total: None, told=said.append,
    )  # fmt: skip
    assert len(said) == 1 and "it waits for the device" in said[0]
    assert any(bool(leaf.any()) for block in blocks for leaf in block.leaves)


@pytest.mark.parametrize("tuning", STEPPING)
def test_a_run_writes_what_tuning_moved_and_nothing_else(tmp_path: Path, tuning: str) -> None:
    choices = {"group_size": GROUP, "bits": 3, "format": "compressed-tensors"}
    plain = run_on(tiny_model("llama"), tmp_path, Recipe.preset("fast", **choices), out="plain")
    recipe = Recipe.preset("fast", tuning=tuning, tuning_epochs=20, **choices)
    tuned = run_on(tiny_model("llama"), tmp_path, recipe, out="tuned")
    assert tuned.report.tuning is not None
    assert plain.report.tuning is None
    assert tuned.report.tuning.fallback is None
    assert tuned.report.tuning.held_out_kl < tuned.report.tuning.held_out_kl_before
    before, after = written(plain.directory), written(tuned.directory)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.endswith("weight_scale") for name in moved)
    assert any("norm" in name for name in moved)
    assert all(name.endswith("weight_scale") or "norm" in name for name in moved)
    assert "before tuning" in str(tuned.report)
    assert load(tuned.directory) is not None


def test_tuning_that_has_no_room_is_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = {"group_size": GROUP, "bits": 3, "format": "compressed-tensors"}
    plain = run_on(tiny_model("llama"), tmp_path, Recipe.preset("fast", **choices), out="plain")
    monkeypatch.setattr(tuning_stage, "free_bytes", lambda device: 1000.0)
    events: list[object] = []
    recipe = Recipe.preset("fast", tuning_epochs=20, **choices)
    tuned = run_on(tiny_model("llama"), tmp_path, recipe, out="tuned", emit=events.append)
    (caution,) = [event.text for event in events if isinstance(event, Caution) and "not tuned" in event.text]
    assert "cpu has 0.0 GB free" in caution
    assert tuned.report.tuning.fallback == caution
    before, after = written(plain.directory), written(tuned.directory)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("rows_at_once", [1, 2])
def test_a_step_descends_the_mean_kl_of_its_real_tokens(rows_at_once: int) -> None:
    ids = token_ids(2, 24)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 15:] = False
    skeleton, blocks, rows = _quantized(ids, "rows")
    padded = TuningRows(TokenRows(ids, mask), hidden_states(skeleton, ids, mask), rows.last)
    with skeleton.head(CPU) as head:
        tune_module._backward(Head(head, rows_at_once), BlocksPass(blocks), padded, 0)
        found = [leaf.grad.clone() for block in blocks for leaf in block.leaves]
        for block in blocks:
            for leaf in block.leaves:
                leaf.grad = None
        _, hidden, calls, real = padded.first.batch(0)
        with torch.enable_grad():
            for block, call in zip(blocks, calls, strict=True):
                hidden = block(hidden, call).hidden
            kl = token_kl(head(ids, current(rows.last), real), head(ids, hidden, real))
            sum(kl[row][mask[row]].mean() for row in range(2)).div(2).backward()
    expected = [leaf.grad for block in blocks for leaf in block.leaves]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def test_held_weights_change_nothing_but_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = token_ids(4, 24)
    changes = []
    for hold in (TunableLinear.hold, lambda self: None):
        monkeypatch.setattr(TunableLinear, "hold", hold)
        skeleton, blocks, rows = _quantized(ids, "rows")
        _tune(skeleton, blocks, rows, 3, STEPPING["rows"])
        changes.append([leaf.detach().clone() for block in blocks for leaf in block.leaves])
    assert all(torch.equal(one, other) for one, other in zip(*changes, strict=True))
