"""Experts are corrected for errors of earlier linears by what all tokens of the tensor that they pick from ask for."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_contexts import GROUP, run_on
from tiny_models import tiny_model, token_rows
from torch import Tensor

from awqkit import Recipe
from awqkit.methods.evidence import Evidence
from awqkit.numerics.grid import dequantize
from awqkit.numerics.statistics import PairedStatistics
from awqkit.pipeline import block_step, search_block

RECIPE = Recipe.preset("balanced", group_size=GROUP, bits=3, format="compressed-tensors", folds="off", generated=0)
EXPERTS, ROWS = 4, 36  # of the rows every ninth is held out


def _model() -> Any:
    return tiny_model("llama", model_type="mixtral", num_local_experts=EXPERTS, num_experts_per_tok=2)


def _router_inputs(model: Any) -> Tensor:
    """What the first block's router reads of the calibration rows, `[tokens, width]` float64."""
    ids, seen = torch.tensor([row for number, row in enumerate(token_rows(ROWS, 24)) if number % 9 != 8]), []
    hook = model.model.layers[0].mlp.gate.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]).double()


def _close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert float((found.double() - expected).abs().max()) < tolerance * float(expected.abs().max())


def test_the_pairs_are_those_of_the_router_and_every_expert_gets_their_correction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[PairedStatistics, Evidence]] = []
    used: dict[str, tuple[Evidence, Any]] = {}
    propagated, begin_linear = block_step.propagated_evidence, search_block.begin_linear

    def remembered(paired: PairedStatistics, *rest: Any, **named: Any) -> Evidence:
        made.append((deepcopy(paired), propagated(paired, *rest, **named)))  # which takes the buffers of `paired`
        return made[-1][1]

    def noted(scaled: Any, evidence: Any, plan: Any, *rest: Any) -> Any:
        linear = begin_linear(scaled, evidence, plan, *rest)()
        if plan.rounds and plan.name.startswith("model.layers.0."):
            used[plan.name] = evidence, linear
        return lambda: linear

    monkeypatch.setattr(block_step, "propagated_evidence", remembered)
    monkeypatch.setattr(search_block, "begin_linear", noted)
    model = _model()
    report = run_on(model, tmp_path, RECIPE, rows=ROWS).report
    experts = {name: evidence for name, (evidence, _) in used.items() if "experts" in name}
    last = [evidence for name, evidence in experts.items() if name.endswith("down_proj")]
    first = [evidence for name, evidence in experts.items() if not name.endswith("down_proj")]
    assert len(last) == EXPERTS
    assert all(each.shift is None and each.strength == 0 for each in last)
    assert all(each.shift is first[0].shift and each.strength == 0.5 for each in first)
    (paired,) = [pair for pair, evidence in made if evidence.shift is first[0].shift]
    original = _router_inputs(model)
    for name, (_, linear) in used.items():
        if "self_attn" in name:
            weight = linear.quantized
            model.get_submodule(name).weight.data = dequantize(weight.codes, weight.grid)
    met = _router_inputs(model)
    _close(paired.quantized.gram, met.T @ met, 5e-3)
    _close(paired.cross_gram - paired.quantized.gram, (original - met).T @ met, 0.1)
    strengths = {linear.propagation for block in report.blocks for linear in block.linears if "experts" in linear.name}
    assert strengths == {0.0, 0.5}


def test_experts_whose_input_is_not_found_keep_to_their_own_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_step.KeptInputs, "source_of", lambda self, experts: None)
    report = run_on(_model(), tmp_path, RECIPE, rows=ROWS).report
    found = [linear.propagation for block in report.blocks for linear in block.linears if "experts" in linear.name]
    assert set(found) == {0.0}
    assert len(found) == 2 * 3 * EXPERTS or len(found) == 2 * 2 * EXPERTS
