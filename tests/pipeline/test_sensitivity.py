"""G of every linear is E[g gᵀ] of the whole model's gradient at its output."""

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
    sampled_loss,
    token_ids,
)
from tiny_models import WeightsOf, tiny_model
from torch import Tensor, nn

from awqkit import Recipe
from awqkit.methods import rows
from awqkit.model.skeleton import Skeleton
from awqkit.pipeline.activations import TokenRows
from awqkit.pipeline.end_gradients import measure_end_gradients
from awqkit.pipeline.quantized_block import advance
from awqkit.pipeline.sensitivity import measure_sensitivity

BEST = Recipe.preset("best", group_size=GROUP)


def _full_autograd(
    model: Any, paths: list[str], ids: Tensor, mask: Tensor | None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The gradient at every linear's and at every block's output, by one backward pass through the whole model."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden.retain_grad()
            kept[name] = hidden

        return hook

    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name]
    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in (*linears, *paths)]
    keywords = {} if mask is None else {"attention_mask": mask.long()}
    sampled_loss(model(ids, **keywords).logits.float(), mask, seed=0).backward()
    for handle in handles:
        handle.remove()
    return {name: kept[name].grad for name in linears}, [kept[path].grad for path in paths]


def _second_moment(gradient: Tensor, mask: Tensor | None) -> Tensor:
    tokens = gradient.double()[mask] if mask is not None else gradient.double().flatten(0, -2)
    return tokens.t() @ tokens / len(tokens)


def _close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return float((found.double() - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "cohere"])
def test_g_is_the_second_moment_of_the_gradients_of_full_autograd(family: str, padded: bool) -> None:
    model, ids = tiny_model(family), token_ids(4, 16)
    mask = None
    if padded:
        mask = torch.ones(4, 16, dtype=torch.bool)
        mask[2, 9:] = False
    states = hidden_states(Skeleton(model.config, WeightsOf(model)), ids, mask)
    contexts = [block_context(model, index) for index in range(2)]
    gradients, ends = _full_autograd(model, [context.block_plan.path for context in contexts], ids, mask)
    for context, end in zip(contexts, ends, strict=True):
        before = current(states)
        found = measure_sensitivity(context, states, end)
        assert torch.equal(current(states), before)
        assert set(found) == {view.name for view in context.structure.linears}
        for view in context.structure.linears:
            expected = _second_moment(gradients[f"{context.block_plan.path}.{view.name}"], mask)
            assert found[view.name].shape == (view.shape[0], view.shape[0])
            assert torch.equal(found[view.name], found[view.name].t())
            assert _close(found[view.name], expected, 1e-3)
        advance(context, states, {})


def test_it_takes_the_gradients_that_the_reverse_pass_measured() -> None:
    model, ids = tiny_model("llama"), token_ids(4, 16)
    skeleton = Skeleton(model.config, WeightsOf(model))
    ends = measure_end_gradients(skeleton, TokenRows(ids), CPU, 0, lambda block: None)
    context = block_context(model, 0)
    found = measure_sensitivity(context, hidden_states(skeleton, ids), ends.at(0))
    gradients, _ = _full_autograd(model, [context.block_plan.path], ids, None)
    for name, sensitivity in found.items():
        expected = _second_moment(gradients[f"{context.block_plan.path}.{name}"], None)
        assert _close(sensitivity, expected, 0.03)


def _fisher(model: Any, changed: dict[str, Tensor], gradients: dict[str, Tensor], inputs: dict[str, Tensor]) -> float:
    """Σ over linears of tr(G E H Eᵀ) in float64, from full autograd and the linears' own inputs."""
    total = 0.0
    for name, weight in changed.items():
        error = weight.double() - model.get_submodule(name).weight.detach().double()
        g, h = (_second_moment(each[name], None) for each in (gradients, inputs))
        total += float(torch.trace(g @ error @ h @ error.t()))
    return total


def test_with_sensitivity_errors_cost_the_end_loss_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged by G and H of full autograd, with propagation off so that both aim at the same weights."""
    monkeypatch.setattr(rows, "ROWS_AT_ONCE", 16)
    monkeypatch.setattr(rows, "MOST_BLOCKS", 1000)
    model, ids = tiny_model("llama"), token_ids(24, 24)
    skeleton = Skeleton(model.config, WeightsOf(model))
    ends = measure_end_gradients(skeleton, TokenRows(ids), CPU, 0, lambda block: None)
    paths = [skeleton.block_path(index) for index in range(2)]
    inputs: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0].detach()))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    ]
    gradients, _ = _full_autograd(model, paths, ids, None)
    for handle in handles:
        handle.remove()
    costs = []
    for sensitivity in ("none", "end-loss"):
        recipe = replace(
            BEST, bits=3, rounds=1, propagation=0.0, channel_scale="none", clip="none", sensitivity=sensitivity
        )
        changed = {}
        blocks = quantized_blocks(model, recipe, ids, None, ends if sensitivity != "none" else None)
        for context, result, _ in blocks:
            for name, weight in result.quantized.items():
                scale, zero = (
                    value.repeat_interleave(GROUP, dim=1) for value in (weight.grid.group_scale, weight.grid.group_zero)
                )
                changed[f"{context.block_plan.path}.{name}"] = (weight.codes - zero) * scale
        costs.append(_fisher(model, changed, gradients, inputs))
    assert costs[1] < 0.97 * costs[0]


def test_a_run_with_sensitivity_decides_everything_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = tmp_path / "states"
    states.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(states))
    result = run_on(tiny_model("llama"), tmp_path, BEST)
    assert list(states.iterdir()) == []
    for block in result.report.blocks:
        assert len(block.linears) == 7
        assert block.fallback is not None or block.held_out_error <= block.held_out_error_nearest
