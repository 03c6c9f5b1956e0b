"""Linears that stay in full precision beside scaled ones: exact under powers of two, or rounded where that pays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_contexts import GROUP, run_on, written
from tiny_models import tiny_model
from torch import Tensor

from awqkit import Recipe
from awqkit.api.load import load
from awqkit.pipeline import search_block


def _is_power_of_two(s: Tensor) -> bool:
    exponents = torch.log2(s)
    return torch.equal(exponents, exponents.round())


def test_a_kept_consumer_gets_a_power_of_two_and_loses_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cohere's one norm feeds q, k, v (kept here, and rounding them is dear) and gate and up (quantized)."""
    cost = search_block.storage_cost
    monkeypatch.setattr(search_block, "storage_cost", lambda *arguments: 1e9 * cost(*arguments))
    model = tiny_model("cohere")
    recipe = Recipe.preset("fast", group_size=GROUP, ignore=("*.q_proj",))
    result = run_on(model, tmp_path, recipe)
    found, source = written(result.directory), dict(model.named_parameters())
    scaled = 0
    for index, block in enumerate(result.report.blocks):
        fold = next(fold for fold in block.folds if fold.producer == "input_layernorm")
        assert fold.fallback is None
        assert {entry.name.rpartition(".")[2] for entry in block.kept} == {"q_proj", "k_proj", "v_proj"}
        base = f"model.layers.{index}"
        norm = f"{base}.input_layernorm.weight"
        s = source[norm] / found[norm].float()
        assert _is_power_of_two(s)
        scaled += int((s != 1).sum())
        for name in ("q_proj", "k_proj"):
            weight = f"{base}.self_attn.{name}.weight"
            assert torch.equal(found[weight].float(), source[weight] * s)
        # v also produces for o: its rows are divided by powers of two of their own
        weight = f"{base}.self_attn.v_proj.weight"
        rows = source[weight] * s / found[weight].float()
        assert torch.equal(rows, rows[:, :1].expand_as(rows))
        assert _is_power_of_two(rows[:, 0])
        assert f"{base}.mlp.up_proj.qweight" in found
    assert scaled > 20


def test_a_kept_consumer_is_rounded_where_the_others_gain_more_by_it(tmp_path: Path) -> None:
    """The very same model: what q, k and v lose to bfloat16 is little beside what 4 bits lose under powers of two."""
    model = tiny_model("cohere")
    recipe = Recipe.preset("fast", group_size=GROUP, ignore=("*.q_proj",))
    result = run_on(model, tmp_path, recipe)
    found, source = written(result.directory), dict(model.named_parameters())
    for index, block in enumerate(result.report.blocks):
        fold = next(fold for fold in block.folds if fold.producer == "input_layernorm")
        assert fold.kept_columns == "rounded"
        assert fold.fallback is None
        base = f"model.layers.{index}"
        s = source[f"{base}.input_layernorm.weight"] / found[f"{base}.input_layernorm.weight"].float()
        assert not _is_power_of_two(s)
        for name in ("q_proj", "k_proj"):
            weight = f"{base}.self_attn.{name}.weight"
            assert torch.equal(found[weight].float(), (source[weight] * s).to(torch.bfloat16).float())
    loaded = load(result.directory, dtype=torch.float32, device="cpu")
    assert torch.isfinite(loaded(torch.tensor([[1, 5, 9]])).logits).all()


def test_a_kept_producer_is_divided_by_powers_of_two(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    recipe = Recipe.preset("fast", group_size=GROUP, ignore=("*.v_proj",))
    result = run_on(model, tmp_path, recipe)
    found, source = written(result.directory), dict(model.named_parameters())
    for index in range(2):
        base = f"model.layers.{index}"
        # everything that the norm feeds is kept, so there was nothing to scale for
        assert "input_layernorm" not in [fold.producer for fold in result.report.blocks[index].folds]
        norm = f"{base}.input_layernorm.weight"
        assert torch.equal(found[norm].float(), source[norm])
        for name in ("q_proj", "k_proj"):
            weight = f"{base}.self_attn.{name}.weight"
            assert torch.equal(found[weight].float(), source[weight])
        weight, bias = (f"{base}.self_attn.v_proj.{leaf}" for leaf in ("weight", "bias"))
        r = (source[weight] / found[weight].float())[:, 0]
        assert _is_power_of_two(r)
        assert bool((r != 1).any())
        assert torch.equal(found[weight].float() * r[:, None], source[weight])
        assert torch.equal(found[bias].float() * r, source[bias])
        assert f"{base}.self_attn.o_proj.qweight" in found


def test_a_fold_whose_consumers_are_all_kept_is_left_out(tmp_path: Path) -> None:
    model = tiny_model("llama")
    recipe = Recipe.preset("fast", group_size=GROUP, ignore=("*.o_proj", "*.down_proj"))
    result = run_on(model, tmp_path, recipe)
    found, source = written(result.directory), dict(model.named_parameters())
    for index, block in enumerate(result.report.blocks):
        assert [fold.producer for fold in block.folds] == ["input_layernorm", "post_attention_layernorm"]
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weight = f"model.layers.{index}.{name}.weight"
            assert torch.equal(found[weight].float(), source[weight])
