"""Row weights: a rescaling of v and up rows that changes nothing in the model changes no channel scale before them."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_contexts import GROUP, block_context, hidden_states, run_on, token_ids, written
from tiny_models import block_probes, tiny_model, token_rows

from awqkit import Recipe
from awqkit.methods.fold import consumer_scale
from awqkit.pipeline import block_step
from awqkit.pipeline.observe_block import measure_row_weights

NORMS = [
    f"model.layers.{block}.{norm}.weight"
    for block in (0, 1)
    for norm in ("input_layernorm", "post_attention_layernorm")
]
RECIPES = {"awq": Recipe.method("awq", group_size=GROUP), "fast": Recipe.preset("fast", group_size=GROUP)}


def _twin(model: Any) -> Any:
    """The same function to the last bit: v and up rows times powers of two from 1/64 to 64, undone in o and down."""
    skeleton, _, structures = block_probes(model)
    twin = deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    for index, structure in enumerate(structures):
        parameters = dict(twin.get_submodule(skeleton.block_path(index)).named_parameters())
        for fold in structure.folds:
            if fold.producer_linear is None:
                continue
            factor = torch.exp2(torch.randint(-6, 7, (fold.num_channels,), generator=generator).float())
            with torch.no_grad():
                for name in fold.producer:
                    parameters[name].mul_(factor.reshape(-1, *(1,) * (parameters[name].dim() - 1)))
                for name in fold.consumers:
                    parameters[structure.linear(name).weight].div_(consumer_scale(factor, fold.channel_of[name]))
    return twin


def test_the_twin_is_the_same_function() -> None:
    model = tiny_model("llama")
    ids = torch.tensor(token_rows(2, 16))
    with torch.no_grad():
        assert torch.equal(_twin(model)(ids).logits, model(ids).logits)


def _norms(model: Any, folder: Path, recipe: Recipe) -> dict[str, torch.Tensor]:
    result = run_on(model, folder, recipe)
    assert all(block.num_fallbacks == 0 for block in result.report.blocks)
    tensors = written(result.directory)
    return {name: tensors[name] for name in NORMS}


@pytest.mark.parametrize("name", RECIPES)
def test_a_twin_with_rescaled_rows_gets_the_same_norms(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, twin, recipe = tiny_model("llama"), _twin(tiny_model("llama")), RECIPES[name]
    plain, rescaled = _norms(model, tmp_path / "plain", recipe), _norms(twin, tmp_path / "twin", recipe)
    assert all(torch.equal(plain[norm], rescaled[norm]) for norm in NORMS)

    def all_ones(context: Any, probe_rows: Any) -> dict[str, torch.Tensor]:
        return {name: torch.ones_like(rows) for name, rows in measure(context, probe_rows).items()}

    measure = block_step.measure_row_weights
    monkeypatch.setattr(block_step, "measure_row_weights", all_ones)
    plain, rescaled = _norms(model, tmp_path / "plain1", recipe), _norms(twin, tmp_path / "twin1", recipe)
    assert not any(torch.equal(plain[norm], rescaled[norm]) for norm in NORMS)


def test_row_weights_are_mean_squared_gradients_of_a_probe() -> None:
    """Scaling a producer's rows by f and undoing it behind them divides its row weights by f²."""
    model = tiny_model("llama")
    context = block_context(model)
    weights = measure_row_weights(context, hidden_states(context.skeleton, token_ids(2, 16)))
    shapes = {view.name: view.shape[0] for view in context.structure.linears}
    assert {name: len(rows) for name, rows in weights.items()} == shapes
    assert all(bool((rows >= 0).all()) and float(rows.max()) > 0 for rows in weights.values())
    # the down projection adds straight to the output, so its gradient is the probe: N(0, 1) squared
    down = weights["mlp.down_proj"]
    torch.testing.assert_close(float(down.mean()), 1.0, rtol=0.2, atol=0)

    twin = block_context(_twin(model))
    rescaled = measure_row_weights(twin, hidden_states(twin.skeleton, token_ids(2, 16)))
    factor = (twin.weight("mlp.up_proj") / context.weight("mlp.up_proj"))[:, 0]
    torch.testing.assert_close(rescaled["mlp.up_proj"] * factor.square(), weights["mlp.up_proj"])
    torch.testing.assert_close(rescaled["self_attn.q_proj"], weights["self_attn.q_proj"])


def test_row_weights_follow_the_seed() -> None:
    model = tiny_model("llama")
    found = []
    for seed in (0, 0, 1):
        context = block_context(model, recipe=replace(RECIPES["awq"], seed=seed))
        found.append(measure_row_weights(context, hidden_states(context.skeleton, token_ids(2, 16)))["mlp.up_proj"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
