"""What does harm is undone: a fold, or a whole block, and the checkpoint is then the one without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_contexts import GROUP, run_on, written
from tiny_models import tiny_model

from awqkit import Recipe
from awqkit.methods.fold import ChannelScale
from awqkit.pipeline import block_step, search_block

FAST = Recipe.preset("fast", group_size=GROUP)


def _absurd(found: ChannelScale) -> ChannelScale:
    """Every other channel all but erased."""
    s = torch.where(torch.arange(len(found.per_channel)) % 2 == 0, 1e-3, 1e3)
    return replace(found, per_channel=s)


def _same_tensors(first: Path, second: Path) -> bool:
    a, b = written(first), written(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "opt"])
def test_folds_that_do_harm_are_undone_and_nothing_is_left_of_them(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, begin = tiny_model(family), search_block.begin_channel_scale
    plain = run_on(model, tmp_path, replace(FAST, channel_scale="none"), out="plain")
    monkeypatch.setattr(search_block, "begin_channel_scale", lambda *a, **k: lambda: _absurd(begin(*a, **k)()))
    result = run_on(model, tmp_path, FAST)
    for block in result.report.blocks:
        assert len(block.folds) == 4
        for fold in block.folds:
            assert fold.fallback is not None
            assert "s = 1 restored" in fold.fallback
            assert fold.error_chosen > fold.error_nearest
    assert _same_tensors(result.directory, plain.directory)


def test_one_fold_that_does_harm_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only v → o is spoiled: v's rows must be rounded again too, for they were on their way divided by s."""
    begin, calls = search_block.begin_channel_scale, []

    def spoil_the_third(*arguments: Any, **choices: Any) -> Callable[[], ChannelScale]:
        calls.append(None)
        found, third = begin(*arguments, **choices)(), len(calls) % 4 == 3
        return lambda: _absurd(found) if third else found

    model = tiny_model("llama")
    monkeypatch.setattr(search_block, "begin_channel_scale", spoil_the_third)
    result = run_on(model, tmp_path, FAST)
    assert [fold.fallback is None for fold in result.report.blocks[0].folds] == [True, True, False, True]

    def no_third(*arguments: Any, **choices: Any) -> Callable[[], ChannelScale]:
        calls.append(None)
        found, third = begin(*arguments, **choices)(), len(calls) % 4 == 3
        ones = replace(found, per_channel=torch.ones_like(found.per_channel))
        return lambda: ones if third else found

    calls.clear()
    monkeypatch.setattr(search_block, "begin_channel_scale", no_third)
    expected = run_on(model, tmp_path, FAST, out="expected")
    assert _same_tensors(result.directory, expected.directory)


def test_a_block_that_is_worse_on_held_out_rows_is_rounded_plainly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = block_step.check_held_out

    def second_block_is_worse(context: Any, *arguments: Any) -> Any:
        (plain, chosen), reached = check(context, *arguments)
        return (plain, 2 * plain if context.index == 1 else chosen), reached

    model = tiny_model("qwen2")
    monkeypatch.setattr(block_step, "check_held_out", second_block_is_worse)
    result = run_on(model, tmp_path, FAST)
    first, second = result.report.blocks
    assert first.fallback is None
    assert first.held_out_error < first.held_out_error_nearest
    assert "held-out rows were worse" in second.fallback
    assert second.held_out_error == second.held_out_error_nearest
    assert [fold.fallback for fold in second.folds] == [second.fallback] * 4
    assert all(linear.output_error == linear.output_error_nearest for linear in second.linears)

    plain = written(run_on(model, tmp_path, Recipe.method("rtn", group_size=GROUP), out="rtn").directory)
    found = written(result.directory)
    same = {name: torch.equal(found[name], value) for name, value in plain.items()}
    assert all(equal for name, equal in same.items() if "layers.1." in name)
    assert not same["model.layers.0.mlp.up_proj.qweight"]
    assert not same["model.layers.0.input_layernorm.weight"]


def test_an_inexact_fold_is_not_used_and_the_report_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from awqkit.pipeline import observe_block

    proof_errors = observe_block.proof_errors

    def attention_norm_is_inexact(block: Any, run: Any, hidden: Any, structure: Any, folds: Any) -> list[float]:
        found = proof_errors(block, run, hidden, structure, folds)
        return [0.5 if fold.label == "input_layernorm" else error for fold, error in zip(folds, found, strict=True)]

    monkeypatch.setattr(observe_block, "proof_errors", attention_norm_is_inexact)
    model = tiny_model("llama")
    result = run_on(model, tmp_path, FAST)
    refused = [fold for fold in result.report.blocks[0].folds if fold.fallback]
    assert [(fold.producer, fold.proof_error) for fold in refused] == [("input_layernorm", 0.5)]
    assert "not exact in this block" in refused[0].fallback
    found, source = written(result.directory), dict(model.named_parameters())
    name = "model.layers.0.input_layernorm.weight"
    assert torch.equal(found[name].float(), source[name])
    name = "model.layers.0.post_attention_layernorm.weight"
    assert not torch.equal(found[name].float(), source[name])


@pytest.mark.parametrize(
    "recipe",
    [
        FAST,
        Recipe.preset("balanced", group_size=GROUP),
        Recipe.preset("best", group_size=GROUP, rounds=1),
        Recipe.method("awq", group_size=GROUP, alpha_search="layer"),
        Recipe.method("gptq", group_size=GROUP),
    ],
    ids=lambda recipe: recipe.name,
)
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_on_a_real_run_no_choice_is_worse_than_plain_rounding(family: str, recipe: Recipe, tmp_path: Path) -> None:
    result = run_on(tiny_model(family), tmp_path, recipe)
    for block in result.report.blocks:
        assert block.fallback is not None or block.held_out_error <= block.held_out_error_nearest
        for fold in block.folds:
            assert fold.fallback is not None or fold.error_chosen <= fold.error_nearest
    errors = [(linear.output_error_nearest, linear.output_error) for b in result.report.blocks for linear in b.linears]
    assert sum(chosen for _, chosen in errors) < 0.7 * sum(plain for plain, _ in errors)
