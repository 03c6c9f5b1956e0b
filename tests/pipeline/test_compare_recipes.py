"""Several recipes in one pass: each as if it were alone, and nothing is done or held twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_contexts import CPU, GROUP, current, quantized_blocks, token_ids
from tiny_models import NUM_BLOCKS, WeightsOf, tiny_model
from torch import Tensor

from awqkit import Recipe
from awqkit.errors import CheckpointError, NoRoomError
from awqkit.events import BlockFinished, Caution, Event, TaskAdvanced, TaskStarted, ignore_events
from awqkit.formats.format import FORMATS
from awqkit.model.skeleton import Skeleton
from awqkit.pipeline import block_step, smaller_batches
from awqkit.pipeline import compare as compare_module
from awqkit.pipeline import course as course_module
from awqkit.pipeline.activations import HiddenStates, TokenRows
from awqkit.pipeline.block_memory import block_memory
from awqkit.pipeline.compare import Compared, compare_recipes
from awqkit.pipeline.course import CompareRows, Contender, LearningRows
from awqkit.pipeline.plan import look_at, plan_linears
from awqkit.pipeline.quantized_block import advance
from awqkit.pipeline.tune import STEPPING

NO_OWN_TEXT = {"group_size": GROUP, "generated": 0.0, "tuning_epochs": 0}  # all learn from the same rows, in one pass
RECIPES = {
    "rtn": Recipe.method("rtn", group_size=GROUP),
    "gptq": Recipe.method("gptq", group_size=GROUP),
    "fast": Recipe.preset("fast", group_size=GROUP),
    "balanced": Recipe.preset("balanced", **NO_OWN_TEXT),
    "auto": Recipe.preset("balanced", propagation="auto", bits=3, format="compressed-tensors", **NO_OWN_TEXT),
    "gptq, corrected": Recipe.method("gptq", group_size=GROUP, propagation="auto"),
    "smoothquant": Recipe.method("smoothquant"),
}
CALIBRATION, HELD_OUT, MEASURED = token_ids(20, 24), token_ids(4, 24, seed=1), token_ids(5, 16, seed=2)


def _compare(
    model: Any,
    recipes: dict[str, Recipe],
    emit: Callable[[Event], None] = ignore_events,
    held: Tensor | None = HELD_OUT,
) -> Compared:
    skeleton, awq = Skeleton(model.config, WeightsOf(model)), FORMATS["awq"]
    found = look_at(skeleton, CPU)
    contenders = []
    for label, recipe in recipes.items():
        plan = plan_linears(skeleton, found, recipe, torch.bfloat16, awq.why_not_held, awq.fused_partners)
        contenders.append(Contender(label, recipe, plan))
    learning = LearningRows(TokenRows(CALIBRATION), None if held is None else TokenRows(held))
    rows = CompareRows({recipe.own_text: learning for recipe in recipes.values()}, TokenRows(MEASURED))
    return compare_recipes(skeleton, contenders, rows, CPU, emit)


def _alone(model: Any, recipe: Recipe) -> Tensor:
    """The evaluation rows after the last block, by the steps of a run of this recipe alone."""
    skeleton = Skeleton(model.config, WeightsOf(model))
    states = HiddenStates(skeleton, TokenRows(MEASURED), CPU)
    kept: list[Any] = []
    quantize = block_step.quantize_observed

    def recorded(*arguments: Any) -> Any:
        kept.append(quantize(*arguments))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_step, "quantize_observed", recorded)
        for context, _, _ in quantized_blocks(model, recipe, CALIBRATION, HELD_OUT):
            choice, _ = kept.pop() if recipe.needs_calibration else block_step.round_block(context)
            advance(context, states, choice.quantized)
    return current(states)


@pytest.mark.parametrize("family", ["llama", "gemma4"])
def test_the_original_stream_is_the_models_own_forward(family: str) -> None:
    model = tiny_model(family)
    outputs: list[Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        model(MEASURED, use_cache=False)
    found = _compare(model, {"rtn": RECIPES["rtn"]})
    torch.testing.assert_close(current(found.original), outputs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_each_recipe_reaches_what_it_reaches_alone(family: str) -> None:
    model = tiny_model(family)
    found = _compare(model, RECIPES)
    for (label, recipe), reached in zip(RECIPES.items(), found.reached, strict=True):
        assert torch.equal(current(reached), _alone(model, recipe)), label
        assert not torch.equal(current(reached), current(found.original))


def test_every_block_is_read_once_and_observed_once_however_many_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[int] = []
    observed: list[int] = []
    live = 0
    load, release, observe = Skeleton.load_block, Skeleton.release_block, block_step.observe

    def counted_load(self: Skeleton, index: int, device: torch.device) -> Any:
        nonlocal live
        live += 1
        assert live == 1, "two blocks have weights at once"
        loaded.append(index)
        return load(self, index, device)

    def counted_release(self: Skeleton, index: int) -> None:
        nonlocal live
        live -= 1
        release(self, index)

    def counted_observe(context: Any, *arguments: Any, **choices: Any) -> Any:
        observed.append(context.index)
        return observe(context, *arguments, **choices)

    monkeypatch.setattr(Skeleton, "load_block", counted_load)
    monkeypatch.setattr(Skeleton, "release_block", counted_release)
    monkeypatch.setattr(block_step, "observe", counted_observe)
    _compare(tiny_model("llama"), RECIPES)
    assert loaded == [0, *range(NUM_BLOCKS)]  # the first for discovery
    assert observed == list(range(NUM_BLOCKS))
    assert live == 0


RUN_OUT = {name: RECIPES[name] for name in ("rtn", "fast", "balanced")} | {
    "tuned": Recipe.preset("balanced", group_size=GROUP, generated=0.0)
}


def _with_batches(tokens: int, monkeypatch: pytest.MonkeyPatch, *given: Any) -> Compared:
    with monkeypatch.context() as patch:
        patch.setattr(course_module, "fitting_tokens", lambda *ignored: tokens)
        return _compare(tiny_model("llama"), RUN_OUT, *given)


def test_a_block_that_runs_out_of_memory_begins_again_for_every_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the last recipe of a block runs out once, all is as with batches of half as many from the first block."""
    expected = _with_batches(2 * 24, monkeypatch)
    began, events = [], list[Event]()
    check = block_step.check_held_out

    def failing(context: Any, *rest: Any) -> Any:
        began.append(context.index)
        found = check(context, *rest)
        if began == 3 * [0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return found

    monkeypatch.setattr(smaller_batches, "may_run_out", lambda device: True)
    monkeypatch.setattr(block_step, "check_held_out", failing)
    found = _with_batches(4 * 24, monkeypatch, events.append)
    assert began == 6 * [0] + 3 * [1]
    told = [each.text for each in events if isinstance(each, Caution)]
    assert told == ["model.layers.0: cpu ran out of memory; begun again with 48 tokens at a time"]
    assert found.num_fallbacks == expected.num_fallbacks
    for label, one, other in zip(RUN_OUT, found.reached, expected.reached, strict=True):
        assert torch.equal(current(one), current(other)), label
    assert torch.equal(current(found.original), current(expected.original))


def test_where_one_row_does_not_fit_a_comparison_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*given: Any, **more: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(smaller_batches, "may_run_out", lambda device: True)
    with monkeypatch.context() as patch:
        patch.setattr(block_step, "check_held_out", failing)
        with pytest.raises(NoRoomError, match=r"model.layers.0 does not fit .* GB are needed"):
            _with_batches(2 * 24, monkeypatch)
    monkeypatch.setattr(course_module, "start_streams", failing)
    with pytest.raises(NoRoomError, match=r"the model does not fit .* GB are needed"):
        _with_batches(2 * 24, monkeypatch)


def test_batches_fit_the_recipe_that_needs_the_most_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    skeleton = Skeleton(model.config, WeightsOf(model))
    awq, recipe = FORMATS["awq"], RECIPES["balanced"]
    found_blocks = look_at(skeleton, CPU)
    plan = plan_linears(skeleton, found_blocks, recipe, torch.bfloat16, awq.why_not_held, awq.fused_partners)
    needed = block_memory(skeleton, plan, recipe)
    monkeypatch.setattr(course_module, "free_bytes", lambda device: needed.fixed + 2 * 64 * needed.token)
    found = _compare(model, {name: RECIPES[name] for name in ("rtn", "fast", "balanced")})
    assert found.original.tokens_per_batch == 64


def test_rows_that_recipes_share_are_cut_for_the_one_that_looks_across_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_for, start = list[Recipe](), course_module.start_streams

    def recorded(skeleton: Any, recipe: Recipe, *others: Any, **choices: Any) -> Any:
        cut_for.append(recipe)
        return start(skeleton, recipe, *others, **choices)

    monkeypatch.setattr(course_module, "start_streams", recorded)
    _compare(tiny_model("llama"), {name: RECIPES[name] for name in ("rtn", "fast", "gptq")})
    assert [recipe.rounding for recipe in cut_for] == ["gptq"]


def test_recipes_that_weigh_tokens_are_observed_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    weights: list[bool] = []
    observe = block_step.observe

    def recorded(context: Any, rows: Any, token_weight: Tensor | None, *others: Any, **choices: Any) -> Any:
        weights.append(token_weight is not None)
        return observe(context, rows, token_weight, *others, **choices)

    monkeypatch.setattr(block_step, "observe", recorded)
    best = replace(RECIPES["balanced"], sensitivity="end-loss", rounds=1)
    events: list[Event] = []
    found = _compare(
        tiny_model("llama"),
        {"fast": RECIPES["fast"], "best": best, "best at 3": replace(best, bits=3), "balanced": RECIPES["balanced"]},
        events.append,
    )
    assert weights == [False, True] * NUM_BLOCKS
    assert [event.total for event in events if isinstance(event, TaskStarted)] == [2 * NUM_BLOCKS - 1, NUM_BLOCKS]
    assert found.shared_seconds["end-loss"] > 0


def test_a_tuned_contender_is_taken_through_its_blocks_as_tuned() -> None:
    model = tiny_model("llama")
    plain = replace(RECIPES["fast"], bits=3, format="compressed-tensors")
    tune = compare_module.finish_tuning

    def undone_after_one(*arguments: Any) -> Any:
        decision, moved = tune(*arguments)
        if arguments[1].tuning_epochs > 1:
            return decision, moved
        for block in arguments[5]:
            for leaf in block.leaves:
                leaf.data.zero_()
        return replace(decision, fallback="no better"), [({}, {}) for _ in moved]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_module, "finish_tuning", undone_after_one)
        fast = replace(STEPPING["groups"], learning_rate=0.05)  # two steps must be seen after rounding
        patch.setitem(STEPPING, "groups", fast)
        recipes = {f"tuned {epochs}": replace(plain, tuning_epochs=epochs) for epochs in (1, 2)}
        found = _compare(model, {"plain": plain, **recipes}, held=None)
    first, undone, tuned = (current(reached) for reached in found.reached)
    torch.testing.assert_close(first, undone, rtol=1e-4, atol=1e-4)
    assert found.num_fallbacks == (found.num_fallbacks[0], found.num_fallbacks[0] + 1, found.num_fallbacks[0])
    assert float((tuned - first).norm()) > 1e-3 * float(first.norm())


def test_seconds_belong_to_whoever_took_them() -> None:
    found = _compare(tiny_model("llama"), {"rtn": RECIPES["rtn"], "balanced": RECIPES["balanced"]})
    assert found.seconds[1] > found.seconds[0] > 0
    assert set(found.shared_seconds) == {"start", "observe", "evaluate"}


def test_every_block_ends_with_an_event_that_counts_what_was_undone() -> None:
    events: list[Event] = []
    found = _compare(tiny_model("llama"), {"fast": RECIPES["fast"], "gptq": RECIPES["gptq"]}, events.append)
    finished = [event for event in events if isinstance(event, BlockFinished)]
    assert [event.index for event in finished] == list(range(NUM_BLOCKS))
    assert sum(event.num_fallbacks for event in finished) == sum(found.num_fallbacks)
    details = {event.detail for event in events if isinstance(event, TaskAdvanced)}
    assert {"observe", "fast: search", "fast: check", "gptq: search"} <= details


def test_a_damaged_tensor_is_named() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight holds NaN or inf"):
        _compare(model, {"rtn": RECIPES["rtn"]})
