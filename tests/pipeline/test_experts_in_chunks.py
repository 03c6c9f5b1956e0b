"""Experts whose statistics do not fit together go chunk by chunk, and end where they would have ended together."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_contexts import CPU, GROUP, block_context, current, hidden_states, run_on, token_ids
from tiny_models import MLP_WIDTH, NUM_BLOCKS, WIDTH, save_tiny, tiny_model, token_rows
from torch import Tensor

import awqkit.pipeline.run as pipeline_run
from awqkit import Recipe, RunOptions, quantize
from awqkit.api.estimate import estimate
from awqkit.api.given_model import open_given
from awqkit.decisions import ENOUGH_TOKENS
from awqkit.events import ignore_events
from awqkit.formats.format import FORMATS
from awqkit.numerics.statistics import Statistics, second_moment
from awqkit.pipeline import block_step, compare, course, observe_block, search_block, smaller_batches
from awqkit.pipeline.activations import TokenRows
from awqkit.pipeline.block_memory import BlockMemory, block_memory, fitting_experts
from awqkit.pipeline.block_statistics import BlockStatistics
from awqkit.pipeline.observe_block import observe
from awqkit.pipeline.plan import look_at, plan_linears

CHOICES: dict[str, Any] = {"group_size": GROUP, "bits": 3, "format": "compressed-tensors"}
FAST = Recipe.preset("fast", **CHOICES)
BALANCED = Recipe.preset("balanced", **CHOICES, generated=0, tuning_epochs=0)
RECIPES = {
    "fast": FAST,
    "balanced": BALANCED,
    "gptq": Recipe.method("gptq", **CHOICES),
    "best": Recipe.preset("best", **CHOICES, generated=0, tuning_epochs=0),
    "smoothquant": Recipe.method("smoothquant", format="compressed-tensors"),
    "all experts": replace(FAST, all_experts=True),
}
SHARED_EXPERT: dict[str, Any] = {
    "model_type": "deepseek_v3", "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": MLP_WIDTH,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "q_lora_rank": 32,
    "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4,
}  # fmt: skip
EXPERTS, ROWS = 4, 81  # rows of 24 tokens, of which two of four experts meet each: enough for every expert


def _model(experts: int = EXPERTS) -> Any:
    return tiny_model("llama", model_type="mixtral", num_local_experts=experts, num_experts_per_tok=2)


def _at_once(count: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_run, "fitting_experts", lambda *given: count)


def _contents(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir() if file.name != "awqkit-timings.json"}


def _same_but_for_last_bits(one: Any, other: Any) -> bool:
    """Of what reports hold: the H of all experts together is summed token by token, not expert by expert."""
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same_but_for_last_bits(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same_but_for_last_bits, one, other))
    return one == pytest.approx(other, rel=1e-5) if isinstance(one, float) else one == other


def _assert_same(one: Path, other: Path) -> None:
    """The same bytes but for the last bits of figures in the report."""
    contents = _contents(one), _contents(other)
    reports = [json.loads(found.pop("awqkit.json")) for found in contents]
    assert contents[0] == contents[1]
    assert _same_but_for_last_bits(*reports)


def _chunks_made(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """From now on, what every chunk that is brought consists of."""
    bring, made = BlockStatistics.bring, list[list[str]]()

    def counted(self: BlockStatistics, entries: Any) -> None:
        before = self._brought
        bring(self, entries)
        if self._brought is not before:
            made.append(list(self._brought))

    monkeypatch.setattr(BlockStatistics, "bring", counted)
    return made


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs in which the statistics of all experts are in memory at once."""
    folder = tmp_path_factory.mktemp("together")
    return {name: run_on(_model(), folder, recipe, rows=ROWS, out=name).directory for name, recipe in RECIPES.items()}


@pytest.mark.parametrize(
    ("name", "count"), [*((name, 1) for name in RECIPES), ("fast", 3), ("balanced", 3), ("gptq", EXPERTS)]
)
def test_chunks_write_the_bytes_of_all_experts_at_once(
    name: str, count: int, together: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _at_once(count, monkeypatch)
    made = _chunks_made(monkeypatch)
    done = run_on(_model(), tmp_path, RECIPES[name], rows=ROWS)
    experts = [linear for block in done.report.blocks for linear in block.linears if "experts" in linear.name]
    widths = {"gate_up_proj": WIDTH, "down_proj": MLP_WIDTH}
    assert all(linear.tokens >= ENOUGH_TOKENS * widths[linear.name.rpartition(".")[2]] for linear in experts)
    _assert_same(done.directory, together[name])
    if name not in ("balanced", "best"):  # whose scales for the norm come from the H of all experts
        assert _contents(done.directory) == _contents(together[name])
    passes = {1: 4, 3: 2, EXPERTS: 0}[count]
    assert len(made) == len(done.report.blocks) * passes
    assert all(len(chunk) <= 2 * count for chunk in made)


def test_an_expert_that_every_token_meets_goes_with_those_in_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads the norm that they read, and comes after them."""
    model = tiny_model("llama", **SHARED_EXPERT)
    whole = run_on(model, tmp_path, FAST, rows=ROWS, out="whole")
    _at_once(3, monkeypatch)
    made = _chunks_made(monkeypatch)
    done = run_on(model, tmp_path, FAST, rows=ROWS)
    folds = {fold.producer: fold for fold in done.report.blocks[0].folds}
    assert "mlp.shared_experts.gate_proj" in folds["post_attention_layernorm"].consumers
    assert list(folds)[-1] == "mlp.shared_experts.up_proj"
    assert len(made) == NUM_BLOCKS * 2
    _assert_same(done.directory, whole.directory)


def test_statistics_of_few_tokens_are_those_of_all_at_once_but_for_rounding() -> None:
    """What the others lend is summed over all of them in another order."""
    whole, ids = block_context(_model(16), recipe=BALANCED), token_ids(2, 6)
    token_weight = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0))
    expected = observe(whole, hidden_states(whole.skeleton, ids), token_weight)
    rows = hidden_states(whole.skeleton, ids)
    found = observe(replace(whole, experts_at_once=3), rows, token_weight)
    assert set(found) == set(expected)
    numbers = set()
    for entry in whole.structure.inputs:
        found.bring([entry])
        own, other = found[entry.first], expected[entry.first]
        assert found.tokens(entry.first) == own.token_count == other.token_count
        torch.testing.assert_close(second_moment(own), second_moment(other), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(own.abs_sum, other.abs_sum, rtol=1e-5, atol=1e-6)
        assert torch.equal(own.max_abs, other.max_abs)
        assert torch.equal(own.sample, other.sample)
        numbers.add(found.chunk_of(entry))
    assert numbers == {None, *range(6)}
    states = hidden_states(whole.skeleton, ids)
    observe(whole, states)
    assert torch.equal(rows.rows_of(slice(None)), states.rows_of(slice(None)))


def test_what_all_experts_met_together_is_pooled_while_observing() -> None:
    context, ids = block_context(_model(), recipe=BALANCED), token_ids(81, 24)
    expected = observe(context, hidden_states(context.skeleton, ids))
    found = observe(replace(context, experts_at_once=1), hidden_states(context.skeleton, ids))
    entries = [entry for entry in context.structure.inputs if entry.expert is not None and entry.num_channels == WIDTH]
    one, other = found.pooled(entries), expected.pooled(entries)
    assert one.token_count == other.token_count
    torch.testing.assert_close(second_moment(one), second_moment(other), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.abs_sum, other.abs_sum)
    assert torch.equal(one.sample, other.sample)


def test_an_expert_is_not_there_before_its_chunk_is() -> None:
    context = replace(block_context(_model(), recipe=FAST), experts_at_once=1)
    found = observe(context, hidden_states(context.skeleton, token_ids(4, 6)))
    first, *_, last = [entry for entry in context.structure.inputs if entry.expert is not None]
    found.bring([first])
    assert found[first.first].token_count == found.tokens(first.first)
    with pytest.raises(RuntimeError, match="before its chunk was brought"):
        found[last.first]


def test_no_more_than_a_chunk_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted when an expert's evidence is made, and when the next chunk is about to be."""

    def alive() -> int:
        shape = (MLP_WIDTH, MLP_WIDTH)  # of what only experts read
        return sum(type(each) is Statistics and each.gram.shape == shape for each in gc.get_objects())

    evidence, summed, seen, before = search_block.original_evidence, observe_block._summed, list[int](), list[int]()

    def counted(*given: Any) -> Any:
        seen.append(alive())
        return evidence(*given)

    def counted_before(*given: Any, **named: Any) -> Any:
        before.append(alive())
        return summed(*given, **named)

    monkeypatch.setattr(search_block, "original_evidence", counted)
    monkeypatch.setattr(observe_block, "_summed", counted_before)
    model = _model(6)
    run_on(model, tmp_path, RECIPES["gptq"], rows=18, out="together")
    assert max(seen) == 6
    seen.clear()
    _at_once(2, monkeypatch)
    run_on(model, tmp_path, RECIPES["gptq"], rows=18)
    assert max(seen) == 2 + 1  # and that of all together
    assert max(before) == 1, "a chunk is made before the last one is let go"


def _harmful(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fold of the norm before the experts does harm, or every one inside an expert."""
    fold_cost = search_block.fold_cost

    def cost(consumers: Any) -> tuple[float, float]:
        is_norm = len(consumers) == EXPERTS
        inside = len(consumers) == 1
        return (1.0, 2.0) if (is_norm if which == "norm" else inside) else fold_cost(consumers)

    monkeypatch.setattr(search_block, "fold_cost", cost)


@pytest.mark.parametrize("which", ["norm", "inside"])
def test_folds_are_undone_as_they_are_with_all_at_once(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _harmful(which, monkeypatch)
    whole = run_on(_model(), tmp_path, FAST, rows=ROWS, out="whole")
    _at_once(1, monkeypatch)
    made = _chunks_made(monkeypatch)
    done = run_on(_model(), tmp_path, FAST, rows=ROWS)
    assert _contents(done.directory) == _contents(whole.directory)
    undone = [fold for block in done.report.blocks for fold in block.folds if fold.fallback]
    assert len(undone) >= len(done.report.blocks) * (1 if which == "norm" else EXPERTS)
    again = 1 if which == "norm" else 0  # what lies inside an expert is done again while its chunk is there
    assert len(made) == len(done.report.blocks) * EXPERTS * (1 + again)


def test_a_block_that_is_rounded_plainly_has_the_errors_of_every_expert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = block_step.check_held_out

    def worse(*given: Any) -> Any:
        (plain, _), reached = check(*given)
        return (plain, plain + 1), reached

    monkeypatch.setattr(block_step, "check_held_out", worse)
    whole = run_on(_model(), tmp_path, BALANCED, rows=ROWS, out="whole")
    _at_once(3, monkeypatch)
    done = run_on(_model(), tmp_path, BALANCED, rows=ROWS)
    assert all(block.fallback for block in done.report.blocks)
    _assert_same(done.directory, whole.directory)


def test_a_run_that_goes_on_has_the_chunks_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(_model(), tmp_path / "source")
    options, rows = RunOptions(device="cpu", save_every=0), token_rows(ROWS, 24)
    step, counts = pipeline_run.quantize_block, list[int | None]()

    def run(out: str, count: int | None, stop: int | None) -> None:
        def watched(context: Any, *rest: Any) -> Any:
            if context.index == stop:
                raise KeyboardInterrupt
            counts.append(context.experts_at_once)
            return step(context, *rest)

        _at_once(count, monkeypatch)
        monkeypatch.setattr(pipeline_run, "quantize_block", watched)
        quantize(tmp_path / "source", tmp_path / out, BALANCED, calibration=rows, options=options)

    run("whole", 1, stop=None)
    with pytest.raises(KeyboardInterrupt):
        run("out", 1, stop=1)
    run("out", None, stop=None)
    assert counts == [1] * 4
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")


def test_a_block_whose_chunk_runs_out_of_memory_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _at_once(1, monkeypatch)
    monkeypatch.setattr(smaller_batches, "may_run_out", lambda device: True)
    monkeypatch.setattr(pipeline_run, "fitting_tokens", lambda *given: 96)
    whole = run_on(_model(), tmp_path, BALANCED, rows=ROWS, out="whole")
    monkeypatch.setattr(pipeline_run, "fitting_tokens", lambda *given: 192)
    summed, calls = observe_block._summed, list[bool]()

    def failing(*given: Any, moves_on: bool) -> Any:
        calls.append(moves_on)
        if len(calls) == 3:  # the second chunk of the first block
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return summed(*given, moves_on=moves_on)

    monkeypatch.setattr(observe_block, "_summed", failing)
    done = run_on(_model(), tmp_path, BALANCED, rows=ROWS)
    assert calls == [True, False, False, *([True, False, False, False, False] * NUM_BLOCKS)]
    assert _contents(done.directory) == _contents(whole.directory)


def test_a_comparison_goes_by_chunks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, awq = save_tiny(_model(), tmp_path / "source"), FORMATS["awq"]
    recipes = {"fast": Recipe.preset("fast", group_size=GROUP), "gptq": Recipe.method("gptq", group_size=GROUP)}

    def reached() -> list[Tensor]:
        skeleton = open_given(source, "source", CPU, RunOptions(device="cpu"), needs_logits=False).skeleton
        found, contenders = look_at(skeleton, CPU), []
        for label, recipe in recipes.items():
            plan = plan_linears(skeleton, found, recipe, torch.bfloat16, awq.why_not_held, awq.fused_partners)
            contenders.append(course.Contender(label, recipe, plan))
        learning = course.LearningRows(TokenRows(token_ids(ROWS, 24)), TokenRows(token_ids(4, 24, seed=1)))
        measured = TokenRows(token_ids(5, 16, seed=2))
        rows = course.CompareRows({recipe.own_text: learning for recipe in recipes.values()}, measured)
        return [
            current(each) for each in compare.compare_recipes(skeleton, contenders, rows, CPU, ignore_events).reached
        ]

    whole = reached()
    monkeypatch.setattr(course, "fitting_experts", lambda *given: 3)
    made = _chunks_made(monkeypatch)
    assert all(map(torch.equal, reached(), whole))
    assert len(made) == NUM_BLOCKS * 2 * 2  # chunks for the one recipe and for the other


def test_an_estimate_runs_the_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(_model(), tmp_path / "source")
    _at_once(2, monkeypatch)
    made = _chunks_made(monkeypatch)
    found = estimate(
        tmp_path / "source",
        tmp_path / "out",
        BALANCED,
        calibration=token_rows(18, 24),
        options=RunOptions(device="cpu"),
    )
    assert found.seconds["observe"] > 0
    assert made


def test_the_memory_of_a_block_counts_the_experts_of_a_chunk() -> None:
    context = block_context(_model(), recipe=BALANCED)
    whole = block_memory(context.skeleton, context.plan, BALANCED)
    ordinary = 4 * (2 * WIDTH**2 + WIDTH**2)  # q, k and v; o; the router
    expert = 4 * (WIDTH**2 + MLP_WIDTH**2)
    assert whole.statistics == ordinary + EXPERTS * expert
    assert (whole.experts, whole.expert) == (EXPERTS, expert)
    chunk = block_memory(context.skeleton, context.plan, BALANCED, 1)
    assert chunk.statistics == ordinary + expert + expert  # one, and all together
    assert chunk.fixed < whole.fixed
    assert block_memory(context.skeleton, context.plan, BALANCED, EXPERTS) == whole
    fast = block_memory(context.skeleton, context.plan, FAST)
    assert fast.expert == 4 * GROUP * (WIDTH + MLP_WIDTH)
    assert not fast.is_bound_by_calls  # by those of four experts


@pytest.mark.parametrize(("recipe", "bound"), [(FAST, True), (BALANCED, False)])
def test_many_experts_are_bound_by_calls_where_rows_are_summed_in_one_part(recipe: Recipe, bound: bool) -> None:
    context = block_context(_model(32), recipe=recipe)
    assert block_memory(context.skeleton, context.plan, recipe).is_bound_by_calls == bound


def test_experts_go_in_chunks_of_one_size_where_they_do_not_fit() -> None:
    square = 4 * (7168**2 + 2048**2)
    many = BlockMemory(45 << 30, 256 * square, 1 << 30, 300_000, experts=256, expert=square, together=square)
    assert fitting_experts(many, None, 1) is None
    assert fitting_experts(many, 1e12, 1) is None
    assert fitting_experts(many, 139e9, 1) == 128
    assert fitting_experts(many, 80e9, 1) == 86
    assert fitting_experts(many, 80e9, 3) == 29
    assert fitting_experts(many, 1e8, 1) == 1
    dense = BlockMemory(1 << 30, 1 << 30, 1 << 30, 300_000)
    assert fitting_experts(dense, 1.0, 1) is None
