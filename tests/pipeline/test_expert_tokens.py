"""Experts: each learns from the tokens that its router sends to it, or from all, and from the others where few came."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_contexts import GROUP, block_context, hidden_states, run_on, token_ids, written
from tiny_models import MLP_WIDTH, WIDTH, block_probes, tiny_model
from torch import Tensor, nn

from awqkit import Recipe
from awqkit.api.load import load
from awqkit.decisions import ENOUGH_TOKENS
from awqkit.errors import CheckpointError
from awqkit.model.block_calls import run_block
from awqkit.model.folds import discover
from awqkit.model.proof import PROOF_TOLERANCE, proof_errors, proved_together
from awqkit.numerics.statistics import second_moment
from awqkit.pipeline import search_block
from awqkit.pipeline.context import BlockContext
from awqkit.pipeline.expert_tokens import with_few_tokens_shrunk
from awqkit.pipeline.observe_block import measure_row_weights, observe

FAST = Recipe.preset("fast", group_size=GROUP)
EXPERTS = 4


def _model(experts: int = EXPERTS) -> Any:
    return tiny_model("llama", model_type="mixtral", num_local_experts=experts, num_experts_per_tok=2)


def _routed(context: BlockContext, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What reaches the experts, `[tokens, width]` float64, and which of them each token meets, `[tokens, 2]`."""
    seen = []
    experts = context.block.mlp.experts
    hook = experts.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0], inputs[1])))
    _, hidden, calls, _ = hidden_states(context.skeleton, ids, mask).batch(0)
    with torch.no_grad():
        run_block(context.block, hidden, calls[0])
    hook.remove()
    ((tokens, chosen),) = seen
    return tokens.double(), chosen


@pytest.mark.parametrize("padded", [False, True])
def test_statistics_are_those_of_the_tokens_that_met_the_expert(padded: bool) -> None:
    """Padding and the weight of tokens reach the experts, although they get rows picked out of all of them."""
    context, ids = block_context(_model(), recipe=FAST), token_ids(24, 20)
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        mask[3, 11:] = mask[7, 4:] = False
    token_weight = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0))
    found = observe(context, hidden_states(context.skeleton, ids, mask if padded else None), token_weight)
    tokens, chosen = _routed(context, ids, mask if padded else None)
    for number in range(EXPERTS):
        statistics = found[f"mlp.experts.{number}.gate_up_proj"]
        real = (chosen == number).any(dim=1) & mask.reshape(-1)
        assert statistics.token_count == int(real.sum())
        if int(real.sum()) < ENOUGH_TOKENS * WIDTH:
            continue
        weight = token_weight.reshape(-1).double()[real]
        expected = (tokens[real] * weight.unsqueeze(1)).t() @ tokens[real] / weight.sum()
        torch.testing.assert_close(second_moment(statistics).double(), expected, rtol=1e-4, atol=1e-5)
    counts = [found[f"mlp.experts.{number}.{part}"].token_count for part in ("gate_up_proj", "down_proj")
              for number in range(EXPERTS)]  # fmt: skip
    assert counts[:EXPERTS] == counts[EXPERTS:]
    assert max(counts) >= ENOUGH_TOKENS * WIDTH


def test_with_all_experts_each_learns_from_every_token() -> None:
    context, ids = block_context(_model(), recipe=replace(FAST, all_experts=True)), token_ids(16, 20)
    rows = hidden_states(context.skeleton, ids)
    found = observe(context, rows)
    tokens, _ = _routed(context, ids)
    expected = tokens.t() @ tokens / len(tokens)
    for number in range(EXPERTS):
        statistics = found[f"mlp.experts.{number}.gate_up_proj"]
        assert statistics.token_count == len(tokens)
        torch.testing.assert_close(second_moment(statistics).double(), expected, rtol=1e-4, atol=1e-5)
    assert found["self_attn.q_proj"].token_count == len(tokens)
    plain = block_context(_model(), recipe=FAST)
    unforced = hidden_states(plain.skeleton, ids)
    observe(plain, unforced)
    assert torch.equal(rows.rows_of(slice(None)), unforced.rows_of(slice(None)))  # what moves on was routed as ever


def test_few_tokens_borrow_from_the_others() -> None:
    """Of what is picked from one tensor the mean H of all, and of channels inside an expert a mean diagonal."""
    context, ids = block_context(_model(16), recipe=FAST), token_ids(2, 6)
    found = observe(context, hidden_states(context.skeleton, ids))
    tokens, chosen = _routed(context, ids)
    pooled = sum(tokens[(chosen == n).any(1)].t() @ tokens[(chosen == n).any(1)] for n in range(16))
    pooled = pooled / (2 * len(tokens))
    unmet = [number for number in range(16) if not bool((chosen == number).any())]
    assert unmet
    for number in range(16):
        met = tokens[(chosen == number).any(1)]
        share = len(met) / (ENOUGH_TOKENS * WIDTH)
        own = met.t() @ met / max(len(met), 1)
        moment = second_moment(found[f"mlp.experts.{number}.gate_up_proj"]).double()
        torch.testing.assert_close(moment, share * own + (1 - share) * pooled, rtol=1e-4, atol=1e-5)
    down = second_moment(found[f"mlp.experts.{unmet[0]}.down_proj"])
    assert torch.equal(down, down.diagonal().diag())
    assert float(down[0, 0]) > 0
    assert torch.equal(down.diagonal(), down[0, 0].expand(MLP_WIDTH))


def test_shrinking_leaves_what_has_enough_alone() -> None:
    context, ids = block_context(_model(), recipe=replace(FAST, all_experts=True)), token_ids(20, 20)
    found = observe(context, hidden_states(context.skeleton, ids))
    again = with_few_tokens_shrunk(context.structure, found)
    assert all(again[name] is found[name] for name in found)


def test_rows_of_an_expert_that_no_probe_token_met_weigh_as_much_as_usual() -> None:
    context, ids = block_context(_model(16), recipe=FAST), token_ids(2, 6)
    weights = measure_row_weights(context, hidden_states(context.skeleton, ids))
    _, chosen = _routed(context, ids)
    met = [weights[f"mlp.experts.{number}.down_proj"].mean() for number in set(chosen.flatten().tolist())]
    unmet = next(number for number in range(16) if not bool((chosen == number).any()))
    torch.testing.assert_close(weights[f"mlp.experts.{unmet}.down_proj"].mean(), torch.stack(met).mean())


@pytest.mark.parametrize("preset", ["fast", "balanced", "best"])
def test_every_preset_quantizes_experts_better_than_plain_rounding(preset: str, tmp_path: Path) -> None:
    recipe = Recipe.preset(preset, group_size=GROUP, samples=32, generated=0.0)
    done = run_on(_model(), tmp_path, recipe)
    for block in done.report.blocks:
        experts = [linear for linear in block.linears if "experts" in linear.name]
        assert len(experts) == 2 * EXPERTS
        assert all(linear.tokens > 0 for linear in experts)
        corrected = {linear.name for linear in experts if linear.propagation}
        first = {linear.name for linear in experts if not linear.name.endswith("down_proj")}
        assert corrected == (first if recipe.propagates else set())
        assert sum(linear.output_error for linear in experts) < sum(linear.output_error_nearest for linear in experts)
        assert block.held_out_error < block.held_out_error_nearest
    assert "calibration tokens per expert" in str(done.report)


def test_an_expert_without_tokens_says_so(tmp_path: Path) -> None:
    done = run_on(_model(64), tmp_path, FAST, rows=9)
    unmet = [linear for block in done.report.blocks for linear in block.linears if linear.tokens == 0]
    assert unmet
    assert all("no calibration token met this expert" in linear.fallback for linear in unmet)


def test_a_scale_of_many_tensors_is_undone_for_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm before the experts is read through every expert's tokens; its fold is judged when all are quantized."""
    fold_cost, judged = search_block.fold_cost, []

    def harmful(consumers: Any) -> tuple[float, float]:
        found = fold_cost(consumers)
        if len(consumers) < EXPERTS:
            return found
        judged.append(len(consumers))
        return 1.0, 2.0

    monkeypatch.setattr(search_block, "fold_cost", harmful)
    model = _model()
    done = run_on(model, tmp_path, FAST)
    assert judged == [EXPERTS] * len(done.report.blocks)
    tensors = written(done.directory)
    for index, block in enumerate(done.report.blocks):
        norm = next(fold for fold in block.folds if fold.producer == "post_attention_layernorm")
        assert "raised the consumers' error" in norm.fallback
        name = f"model.layers.{index}.post_attention_layernorm.weight"
        assert torch.equal(tensors[name].float(), model.get_parameter(name))
        router = f"model.layers.{index}.mlp.gate.weight"
        stored = tensors[f"model.layers.{index}.block_sparse_moe.gate.weight"].float()
        assert torch.equal(stored, model.get_parameter(router))


@pytest.mark.parametrize("tuning", ["groups", "rows"])
def test_tuning_moves_the_scales_of_experts_in_their_stacks(tuning: str, tmp_path: Path) -> None:
    choices = {"group_size": GROUP, "bits": 3, "format": "compressed-tensors"}
    plain = run_on(_model(), tmp_path, Recipe.preset("fast", **choices), out="plain")
    tuned = run_on(_model(), tmp_path, Recipe.preset("fast", tuning=tuning, tuning_epochs=20, **choices), out="tuned")
    assert tuned.report.tuning.held_out_kl < tuned.report.tuning.held_out_kl_before
    before, after = written(plain.directory), written(tuned.directory)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {f"model.layers.1.block_sparse_moe.experts.{n}.w2.weight_scale" for n in range(EXPERTS)} <= moved
    assert all(name.endswith("weight_scale") or "norm" in name for name in moved)
    assert load(tuned.directory) is not None


def test_a_damaged_expert_is_named_as_it_is_on_disk(tmp_path: Path) -> None:
    model = _model()
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.experts.gate_up_proj")[2, MLP_WIDTH + 3, 5] = float("nan")
    with pytest.raises(CheckpointError, match=r"layers\.1\.block_sparse_moe\.experts\.2\.w3\.weight holds NaN"):
        run_on(model, tmp_path, FAST)


def test_experts_asked_for_where_there_are_none_are_mentioned(tmp_path: Path) -> None:
    told: list[str] = []
    recipe = replace(FAST, all_experts=True)
    for name, model in (("dense", tiny_model("llama")), ("mixture", _model())):
        run_on(model, tmp_path / name, recipe, emit=lambda event: told.append(getattr(event, "text", "")))
        assert any("this model has no experts" in text for text in told) == (name == "dense")
        told.clear()


def test_experts_that_the_probe_does_not_reach_are_as_their_siblings() -> None:
    """80 experts, of which 32 tokens with two each reach 64."""
    _, _, (structure, *_) = block_probes(_model(80))
    views = [view for view in structure.linears if view.expert is not None]
    assert [view.name for view in views[-2:]] == ["mlp.experts.79.gate_up_proj", "mlp.experts.79.down_proj"]
    assert len(views) == 2 * 80
    folds = {fold.label: fold for fold in structure.folds}
    assert {f"mlp.experts.{number}.gate_up_proj" for number in range(80)} <= set(folds)
    consumers = folds["post_attention_layernorm"].consumers
    assert consumers == ("mlp.gate", *(f"mlp.experts.{number}.gate_up_proj" for number in range(80)))
    inputs = [entry for entry in structure.inputs if entry.expert is not None]
    assert [entry.num_channels for entry in inputs] == [WIDTH, MLP_WIDTH] * 80


def test_experts_in_a_list_of_modules_are_found_as_those_in_a_stack() -> None:
    hidden = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    block = _ListedExperts()
    structure = discover(block, lambda: block(hidden), hidden)
    experts = [view for view in structure.linears if view.expert is not None]
    assert [view.name for view in experts] == [f"experts.{n}.{part}" for n in range(40) for part in ("up", "down")]
    assert [view.weight for view in experts[:2]] == ["experts.0.up.weight", "experts.0.down.weight"]
    folds = {fold.label: fold for fold in structure.folds}
    assert set(folds) == {"norm", *(f"experts.{number}.up" for number in range(40))}
    assert len(folds["norm"].consumers) == 41
    for group in proved_together(structure):
        assert max(proof_errors(block, lambda: block(hidden), hidden, structure, group)) <= PROOF_TOLERANCE


class _ListedExperts(nn.Module):
    """A router that takes one of forty experts, each in a module of its own, as code of other people's has it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.gate = nn.RMSNorm(32), nn.Linear(32, 40, bias=False)
        self.norm.weight.data.uniform_(0.5, 2.0)
        self.experts = nn.ModuleList()
        for _ in range(40):
            self.experts.append(nn.ModuleDict({"up": nn.Linear(32, 48), "down": nn.Linear(48, 32)}))
        self.requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = self.norm(hidden).flatten(0, 1)
        weight, chosen = self.gate(tokens).sigmoid().topk(1)
        added = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen[:, 0] == number)
            if len(rows):
                added[rows] = weight[rows] * expert["down"](expert["up"](tokens[rows]))
        return hidden + added.reshape(hidden.shape)
