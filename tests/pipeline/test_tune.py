"""Tuning of scales and gains: at rest it is the quantized model, it lowers the KL, and what is no help is put back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_contexts import CPU, GROUP, current, hidden_states, quantized_blocks, run_on, token_ids, written
from tiny_models import tiny_model
from torch import Tensor

from awqkit import Recipe
from awqkit.api.load import load
from awqkit.model.block_calls import run_block
from awqkit.model.skeleton import Skeleton
from awqkit.numerics.divergence import token_kl
from awqkit.numerics.grid import dequantize
from awqkit.pipeline import tune as tune_module
from awqkit.pipeline.activations import TokenRows
from awqkit.pipeline.tune import TunableBlock, TuningRows, tune
from awqkit.pipeline.tuning_stage import tunable_block

RECIPE = Recipe.preset("fast", group_size=GROUP, bits=3, format="compressed-tensors")


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_at_rest_a_tunable_block_computes_what_was_quantized(family: str) -> None:
    ids = token_ids(4, 12)
    for context, result, _ in quantized_blocks(tiny_model(family), RECIPE, ids):
        skeleton, index = context.skeleton, context.index
        _, hidden, calls, _ = hidden_states(skeleton, ids).batch(0)
        tunable = tunable_block(context, result)
        found = tunable(hidden, calls[index])
        parameters = dict(context.block.named_parameters())
        for name, value in result.stored.items():
            parameters[name].data = value
        for name, weight in result.quantized.items():
            parameters[context.structure.linear(name).weight].data = dequantize(weight.codes, weight.grid)
        torch.testing.assert_close(found, run_block(context.block, hidden, calls[index]))
        assert tunable.gains  # norms that folds use
        assert not set(tunable.fixed) & (set(tunable.linears) | set(tunable.gains))
        break


def _quantized(ids: Tensor) -> tuple[Skeleton, list[TunableBlock], TuningRows]:
    blocks, skeleton, last = [], None, None
    for context, result, streams in quantized_blocks(tiny_model("llama"), RECIPE, ids):
        blocks.append(tunable_block(context, result))
        skeleton, last = context.skeleton, streams.calibration.original
    assert skeleton is not None
    assert last is not None
    return skeleton, blocks, TuningRows(TokenRows(ids), hidden_states(skeleton, ids), last)


def _tune(skeleton: Skeleton, blocks: list[TunableBlock], rows: TuningRows, epochs: int) -> tuple[float, float]:
    before, after = tune(skeleton, blocks, rows, rows, epochs=epochs, seed=0, device=CPU, step=lambda done, total: None)
    assert before is not None
    assert after is not None
    return before, after


def test_tuning_lowers_the_kl_and_its_first_figure_is_the_quantized_models() -> None:
    ids = token_ids(8, 24)
    skeleton, blocks, rows = _quantized(ids)
    with skeleton.head(CPU) as head, torch.no_grad():
        _, hidden, calls, _ = rows.first.batch(0)
        for block, call in zip(blocks, calls, strict=True):
            hidden = block(hidden, call)
        expected = float(token_kl(head(ids, current(rows.last), None), head(ids, hidden, None)).mean())
    before, after = _tune(skeleton, blocks, rows, epochs=30)
    assert before == pytest.approx(expected, rel=1e-4)
    assert after < 0.98 * before
    assert any(float(leaf.detach().abs().max()) > 1e-3 for block in blocks for leaf in block.leaves)


def test_what_held_out_rows_do_not_like_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_module, "_LEARNING_RATE", 3.0)
    ids = token_ids(8, 24)
    skeleton, blocks, rows = _quantized(ids)
    before, after = _tune(skeleton, blocks, rows, epochs=2)
    assert not after < before
    assert all(float(leaf.detach().abs().max()) == 0 for block in blocks for leaf in block.leaves)


def test_a_run_writes_what_tuning_moved_and_nothing_else(tmp_path: Path) -> None:
    choices = {"group_size": GROUP, "bits": 3, "format": "compressed-tensors"}
    plain = run_on(tiny_model("llama"), tmp_path, Recipe.preset("fast", **choices), out="plain")
    tuned = run_on(tiny_model("llama"), tmp_path, Recipe.preset("fast", tuning_epochs=20, **choices), out="tuned")
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
