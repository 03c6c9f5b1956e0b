"""Models and rows at the edge go through whole blocks: finite codes, and never worse than plain rounding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_contexts import GROUP, quantized_blocks, token_ids
from tiny_models import tiny_model
from torch import Tensor

from awqkit import Recipe
from awqkit.pipeline.block_step import BlockResult

RECIPES = [
    Recipe.preset("fast", group_size=GROUP),
    Recipe.preset("balanced", group_size=GROUP),
    Recipe.preset("balanced", group_size=GROUP, propagation="auto"),
    Recipe.method("gptq", group_size=GROUP),
]


def _check(result: BlockResult) -> None:
    for linear in result.decision.linears:
        assert linear.output_error is not None
        assert linear.output_error < float("inf")
        assert linear.weight_error < float("inf")
    for weight in result.quantized.values():
        assert bool(weight.grid.group_scale.isfinite().all())
        assert bool((weight.grid.group_scale > 0).all())
    assert all(bool(value.isfinite().all()) for value in result.stored.values())
    for fold in result.decision.folds:
        assert fold.fallback is not None or fold.error_chosen <= fold.error_nearest
    decision = result.decision
    if decision.held_out_error is not None:
        assert decision.held_out_error <= decision.held_out_error_nearest


def _all_blocks(model: Any, recipe: Recipe, ids: Tensor, held_out: Tensor | None) -> None:
    results = [result for _, result, _ in quantized_blocks(model, recipe, ids, held_out)]
    assert len(results) == 2
    for result in results:
        _check(result)


@pytest.mark.parametrize("recipe", RECIPES, ids=["fast", "balanced", "auto", "gptq"])
@pytest.mark.parametrize("held_out", [False, True])
def test_one_token_is_enough(recipe: Recipe, held_out: bool) -> None:
    _all_blocks(tiny_model("llama"), recipe, token_ids(1, 1), token_ids(1, 4, seed=1) if held_out else None)


@pytest.mark.parametrize("recipe", RECIPES, ids=["fast", "balanced", "auto", "gptq"])
def test_fewer_columns_than_a_group_are_kept_and_the_others_quantized(recipe: Recipe) -> None:
    model = tiny_model("llama", intermediate_size=16)
    recipe = replace(recipe, group_size=None)
    results = [result for _, result, _ in quantized_blocks(model, recipe, token_ids(4, 16), token_ids(2, 16, seed=1))]
    for result in results:
        _check(result)
        assert [entry.name.rpartition(".")[2] for entry in result.decision.kept] == ["down_proj"]
        assert len(result.quantized) == 6


@pytest.mark.parametrize("recipe", RECIPES, ids=["fast", "balanced", "auto", "gptq"])
def test_dead_channels_zero_rows_and_an_enormous_outlier(recipe: Recipe) -> None:
    model = tiny_model("llama")
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        tensors["model.layers.0.input_layernorm.weight"][5:9] = 0.0
        tensors["model.layers.0.post_attention_layernorm.weight"][3] = 4096.0
        tensors["model.layers.0.self_attn.v_proj.weight"][2] = 0.0
        tensors["model.layers.1.mlp.up_proj.weight"][8:24] = 0.0
        tensors["model.layers.1.mlp.gate_proj.weight"][:, 7] = 0.0
        tensors["model.layers.1.self_attn.q_proj.weight"][4, 11] = 8192.0
    _all_blocks(model, recipe, token_ids(6, 16), token_ids(2, 16, seed=1))
