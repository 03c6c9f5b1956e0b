"""The quantized stream is what the written model computes, and correcting for it brings the model nearer to itself."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_contexts import GROUP, current, quantized_blocks, run_on, token_ids
from tiny_models import tiny_model
from torch import Tensor, nn

from awqkit import Recipe
from awqkit.methods.evidence import Evidence
from awqkit.numerics.activations import round_tokens
from awqkit.numerics.grid import dequantize
from awqkit.numerics.propagation import STRENGTHS
from awqkit.pipeline import block_step
from awqkit.pipeline.activations import HiddenStates
from awqkit.pipeline.block_step import BlockResult
from awqkit.pipeline.context import BlockContext

BALANCED = Recipe.preset("balanced", group_size=GROUP, bits=3)
ROWS, HELD_OUT = token_ids(12, 24), token_ids(3, 24, seed=1)


def _fold(model: Any, context: BlockContext, result: BlockResult) -> None:
    """Put what a block leaves behind into the model: codes as readers see them, norms and biases as stored."""
    target = dict(model.get_submodule(context.block_plan.path).named_parameters())
    for name, value in result.stored.items():
        target[name].data = value.to(torch.bfloat16).float()
    for name, weight in result.quantized.items():
        target[context.structure.linear(name).weight].data = dequantize(weight.codes, weight.grid)


def _outputs(model: Any, path: str, ids: Tensor) -> Tensor:
    """The output of the block at `path`, computed by the whole model."""
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handle = model.get_submodule(path).register_forward_hook(keep)
    with torch.no_grad():
        model(ids)
    handle.remove()
    return found[0]


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("propagation", [0.5, 1.0, "auto"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "cohere", "phi3"])
def test_the_quantized_stream_is_what_the_folded_quantized_model_computes(
    family: str, propagation: float | str
) -> None:
    original = tiny_model(family)
    folded = deepcopy(original)
    recipe = replace(BALANCED, propagation=propagation)
    for context, result, streams in quantized_blocks(original, recipe, ROWS, HELD_OUT):
        _fold(folded, context, result)
        path = context.block_plan.path
        for stream, ids in ((streams.calibration, ROWS), (streams.held_out, HELD_OUT)):
            assert _distance(current(stream.original), _outputs(original, path, ids)) < 1e-5
            expected = _outputs(folded, path, ids)
            assert _distance(current(stream.quantized), expected) < 1e-4
            assert _distance(current(stream.quantized), current(stream.original)) > 1e-2
        assert result.decision.fallback is None


def test_the_check_on_held_out_rows_is_of_what_the_block_really_gets() -> None:
    """‖Y − Ŷ‖² / ‖Y − X‖² with X and Y of the original model, Ŷ of the quantized one with all blocks before it."""
    found, entered = [], []
    for _, result, streams in quantized_blocks(tiny_model("llama"), BALANCED, ROWS, HELD_OUT):
        original, reached = current(streams.held_out.original), current(streams.held_out.quantized)
        entered.append(original)
        found.append((result.decision.held_out_error, float((reached - original).square().sum())))
    contribution = float((entered[1] - entered[0]).square().sum())
    torch.testing.assert_close(found[1][0], found[1][1] / contribution, rtol=1e-3, atol=0)


def test_a_block_that_was_rounded_plainly_is_that_in_the_stream_too(monkeypatch: pytest.MonkeyPatch) -> None:
    check = block_step.check_held_out

    def chosen_is_worse(*arguments: Any) -> Any:
        (plain, _), reached = check(*arguments)
        return (plain, 2 * plain), reached

    monkeypatch.setattr(block_step, "check_held_out", chosen_is_worse)
    original = tiny_model("llama")
    folded = deepcopy(original)
    for context, result, streams in quantized_blocks(original, BALANCED, ROWS, HELD_OUT):
        assert "rounded plainly" in result.decision.fallback
        _fold(folded, context, result)
        for stream, rows in ((streams.calibration, ROWS), (streams.held_out, HELD_OUT)):
            expected = _outputs(folded, context.block_plan.path, rows)
            assert _distance(current(stream.quantized), expected) < 1e-4


def test_with_rounded_inputs_the_stream_is_what_a_w8a8_reader_computes() -> None:
    original = tiny_model("llama")
    folded = deepcopy(original)
    recipe = Recipe.method("smoothquant", propagation=0.5)
    for context, result, streams in quantized_blocks(original, recipe, ROWS, HELD_OUT):
        _fold(folded, context, result)
        for name in result.quantized:
            linear = folded.get_submodule(f"{context.block_plan.path}.{name}")
            linear.register_forward_pre_hook(lambda module, inputs: (round_tokens(inputs[0]),))
        rounded = _outputs(folded, context.block_plan.path, ROWS)
        reached = current(streams.calibration.quantized)
        away = _distance(reached, current(streams.calibration.original))
        assert _distance(reached, rounded) < 0.05 * away  # an input on a tie may fall to either side
        assert away > 1e-3


def _final_errors(recipe: Recipe, model: Any, rows: Tensor = ROWS) -> list[float]:
    """How far the folded quantized model's last states are from the original's, on `rows` and on held-out rows."""
    folded, path = deepcopy(model), ""
    for context, result, _ in quantized_blocks(model, recipe, rows, HELD_OUT):
        _fold(folded, context, result)
        path = context.block_plan.path
    return [_distance(_outputs(folded, path, ids), _outputs(model, path, ids)) for ids in (rows, HELD_OUT)]


def test_the_correction_brings_the_outputs_nearer_to_the_originals() -> None:
    model, rows = tiny_model("llama", num_hidden_layers=3), token_ids(60, 24)
    without, half = (
        _final_errors(replace(BALANCED, bits=2, propagation=strength), model, rows) for strength in (0.0, 0.5)
    )
    assert half[0] < 0.97 * without[0]
    assert half[1] < without[1]


def _strengths(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The strength of every evidence that a run makes from both streams, as they come."""
    found: list[float] = []
    make = block_step.propagated_evidence

    def recorded(*arguments: Any, **named: Any) -> Evidence:
        evidence = make(*arguments, **named)
        found.append(evidence.strength)
        return evidence

    monkeypatch.setattr(block_step, "propagated_evidence", recorded)
    return found


def test_auto_chooses_for_every_input_one_of_five_strengths(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _strengths(monkeypatch)
    recipe = replace(BALANCED, propagation="auto")
    for _ in quantized_blocks(tiny_model("llama"), recipe, token_ids(60, 24), HELD_OUT):
        pass
    assert len(found) >= 8  # four inputs of two blocks
    assert set(found) <= set(STRENGTHS)
    assert found[0] == 0.0  # nothing is quantized before the first
    assert len(set(found)) > 1


def test_auto_without_rows_held_out_makes_half_of_the_correction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _strengths(monkeypatch)
    run_on(tiny_model("llama"), tmp_path, replace(BALANCED, bits=4, propagation="auto"), rows=4)
    assert set(found) == {0.5}


def _copies(monkeypatch: pytest.MonkeyPatch) -> list[HiddenStates]:
    made: list[HiddenStates] = []
    copy = HiddenStates.copy

    def counted(self: HiddenStates) -> HiddenStates:
        made.append(self)
        return copy(self)

    monkeypatch.setattr(HiddenStates, "copy", counted)
    return made


def test_without_propagation_there_is_no_second_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies, strengths = _copies(monkeypatch), _strengths(monkeypatch)
    model = tiny_model("llama")
    run_on(model, tmp_path, replace(BALANCED, bits=4, propagation=0.0), out="none")
    assert copies == []
    assert strengths == []
    run_on(model, tmp_path, replace(BALANCED, bits=4), out="half")
    assert len(copies) > 1
    assert set(strengths) == {0.5}


def _codes(recipe: Recipe) -> Iterator[Tensor]:
    for _, result, _ in quantized_blocks(tiny_model("llama"), recipe, ROWS, HELD_OUT):
        yield from (weight.codes for weight in result.quantized.values())


def test_the_first_input_is_the_same_on_both_streams_and_later_ones_are_not() -> None:
    none, half = (list(_codes(replace(BALANCED, propagation=strength))) for strength in (0.0, 0.5))
    differs = [float((a != b).float().mean()) for a, b in zip(none, half, strict=True)]
    assert all(share < 0.02 for share in differs[:3])  # q, k and v of the first block; H of inputs kept in bfloat16
    assert all(share > 0.1 for share in differs[3:])
