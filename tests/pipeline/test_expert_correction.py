"""Experts are corrected for errors of earlier linears by what all tokens of the tensor that they pick from ask for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_contexts import GROUP, quantized_blocks, token_ids
from tiny_models import tiny_model
from torch import Tensor

from awqkit import Recipe
from awqkit.methods.evidence import Evidence
from awqkit.numerics.grid import dequantize
from awqkit.numerics.statistics import PairedStatistics
from awqkit.pipeline import block_step, search_block

RECIPE = Recipe.preset("balanced", group_size=GROUP, bits=3, folds="off")
ROWS = token_ids(12, 24)


def _model() -> Any:
    return tiny_model("llama", model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)


def _router_inputs(model: Any, block: int) -> Tensor:
    """What the router of a block reads in the whole model, `[tokens, width]` float64."""
    seen = []
    router = model.model.layers[block].mlp.gate
    hook = router.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(ROWS)
    hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]).double()


def test_the_pairs_are_those_of_the_router_and_every_expert_gets_their_correction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[tuple[PairedStatistics, Evidence]] = []
    used: dict[str, Evidence] = {}
    propagated, quantize_linear = block_step.propagated_evidence, search_block.quantize_linear

    def remembered(paired: PairedStatistics, *rest: Any) -> Evidence:
        made.append((paired, propagated(paired, *rest)))
        return made[-1][1]

    def noted(scaled: Any, evidence: Any, plan: Any, *rest: Any) -> Any:
        if plan.rounds and evidence is not None:
            used[plan.name] = evidence
        return quantize_linear(scaled, evidence, plan, *rest)

    monkeypatch.setattr(block_step, "propagated_evidence", remembered)
    monkeypatch.setattr(search_block, "quantize_linear", noted)
    model, changed = _model(), _model()
    changed.load_state_dict(model.state_dict())
    for context, result, _ in quantized_blocks(model, RECIPE, ROWS):
        parameters = dict(changed.get_submodule(context.block_plan.path).named_parameters())
        for name, weight in result.quantized.items():
            view = context.structure.linear(name)
            if view.expert is None:
                parameters[view.weight].data = dequantize(weight.codes, weight.grid)
        original, met = _router_inputs(model, context.index), _router_inputs(changed, context.index)
        names = [name for name in used if "experts" in name]
        first = [used[name] for name in names if not name.endswith("down_proj")]
        last = [used[name] for name in names if name.endswith("down_proj")]
        assert len(last) == 4
        assert all(each.shift is None and each.strength == 0 for each in last)
        assert all(each.shift is first[0].shift and each.strength == 0.5 for each in first)
        (paired,) = [pair for pair, evidence in made if evidence.shift is first[0].shift]
        _close(paired.quantized.gram, met.T @ met)
        _close(paired.cross_gram - paired.quantized.gram, (original - met).T @ met, like=met.T @ met)
        assert {linear.propagation for linear in result.decision.linears if "experts" in linear.name} == {0.0, 0.5}
        break  # experts of the first block compute on other weights than `changed` has from here on


def _close(found: Tensor, expected: Tensor, like: Tensor | None = None) -> None:
    size = float((expected if like is None else like).abs().max())
    assert float((found.double() - expected).abs().max()) < 1e-2 * size


def test_experts_whose_input_is_not_found_keep_to_their_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_step.KeptInputs, "source_of", lambda self, experts: None)
    for _, result, _ in quantized_blocks(_model(), RECIPE, ROWS):
        assert {linear.propagation for linear in result.decision.linears if "experts" in linear.name} == {0.0}
