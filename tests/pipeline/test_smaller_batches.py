"""A block that runs out of memory begins again from its input in smaller batches; what is chosen beforehand fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_contexts import CPU, block_context, current, token_ids, written
from tiny_models import HANDING_ON, WeightsOf, save_tiny, tiny_model, token_rows

import awqkit.pipeline.block_step as block_step
import awqkit.pipeline.run as pipeline_run
from awqkit import Recipe, RunOptions, quantize
from awqkit.errors import NoRoomError
from awqkit.events import Caution
from awqkit.model.block_calls import hand_on
from awqkit.model.skeleton import Skeleton
from awqkit.pipeline import marked_states, smaller_batches
from awqkit.pipeline.activations import HiddenStates, TokenRows
from awqkit.pipeline.block_memory import BlockMemory, block_memory, fitting_tokens

CHOICES: dict[str, Any] = {"group_size": 32, "bits": 3, "format": "compressed-tensors", "generated": 0}
RECIPES = {
    "fast": Recipe.preset("fast", **CHOICES),
    "balanced": Recipe.preset("balanced", **CHOICES, tuning_epochs=0),
    "best": Recipe.preset("best", **CHOICES, tuning_epochs=0),
}
ROWS = token_rows(18, 24)
EVERY_BLOCK = RunOptions(device="cpu", save_every=0)


@pytest.fixture(autouse=True)
def _runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU says when memory runs out, as a GPU does."""
    monkeypatch.setattr(smaller_batches, "may_run_out", lambda device: True)


def _run(folder: Path, out: str, recipe: Recipe, tokens: int, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Path:
    with monkeypatch.context() as patch:
        patch.setattr(pipeline_run, "fitting_tokens", lambda *given: tokens)
        quantize(folder / "source", folder / out, recipe, calibration=ROWS, options=EVERY_BLOCK, **more)
    return folder / out


def _out_of_memory_in(block: int, step: str, times: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on the last batch of a step of `block` runs out of memory, so many times; the blocks that began."""
    whole, began = getattr(block_step, step), []

    def failing(context: Any, *rest: Any, **more: Any) -> Any:
        nonlocal times
        began.append(context.index)
        found = whole(context, *rest, **more)  # every batch was overwritten
        if context.index == block and times:
            times -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return found

    monkeypatch.setattr(block_step, step, failing)
    return began


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("step", ["observe", "check_held_out"])
def test_a_block_that_runs_out_of_memory_begins_again_from_its_input(
    name: str, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run in batches of 8 rows; the first block runs out once, so all that is after the start is as with 4."""
    recipe = RECIPES[name]
    save_tiny(tiny_model("llama"), tmp_path / "source")
    if name != "best":  # whose gradients are measured before the first block, in the batches that were chosen
        expected = written(_run(tmp_path, "expected", recipe, 96, monkeypatch))
    began, events = _out_of_memory_in(0, step, 1, monkeypatch), list[Any]()
    found = written(_run(tmp_path, "out", recipe, 192, monkeypatch, emit=events.append))
    assert began == [0, 0, 1]
    told = [each.text for each in events if isinstance(each, Caution) and "ran out of memory" in each.text]
    tokens = 48 if name == "best" else 96  # a backward pass has batches of half as many
    assert told == [f"model.layers.0: cpu ran out of memory; begun again with {tokens} tokens at a time"]
    if name != "best":
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)


def test_a_resumed_run_has_the_batches_that_the_stopped_one_came_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RECIPES["best"]
    save_tiny(tiny_model("llama", num_hidden_layers=3), tmp_path / "source")
    with monkeypatch.context() as patch:
        _out_of_memory_in(1, "observe", 1, patch)
        whole = written(_run(tmp_path, "whole", recipe, 192, monkeypatch))
    with monkeypatch.context() as patch:
        _out_of_memory_in(1, "observe", 1, patch)
        step = pipeline_run.quantize_block

        def stopping(context: Any, *rest: Any) -> Any:
            if context.index == 2:
                raise KeyboardInterrupt
            return step(context, *rest)

        patch.setattr(pipeline_run, "quantize_block", stopping)
        with pytest.raises(KeyboardInterrupt):
            _run(tmp_path, "out", recipe, 192, monkeypatch)
    found = written(_run(tmp_path, "out", recipe, 24, monkeypatch))  # what would be chosen now does not matter
    assert all(torch.equal(found[key], whole[key]) for key in whole)


def test_where_one_row_does_not_fit_it_says_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tiny_model("llama"), tmp_path / "source")
    began = _out_of_memory_in(1, "observe", 9, monkeypatch)
    with pytest.raises(NoRoomError, match=r"model.layers.1 does not fit .* one row of 24 tokens .* GB are needed"):
        _run(tmp_path, "out", RECIPES["fast"], 96, monkeypatch)
    assert began == [0, 1, 1, 1]


def test_other_errors_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tiny_model("llama"), tmp_path / "source")

    def failing(*given: Any, **choices: Any) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setattr(block_step, "observe", failing)
    with pytest.raises(RuntimeError, match="something else"):
        _run(tmp_path, "out", RECIPES["fast"], 96, monkeypatch)


@pytest.mark.parametrize("family", ["llama", *HANDING_ON])
def test_rows_put_back_and_cut_into_smaller_batches_go_on_as_before(family: str) -> None:
    model, ids = tiny_model(family), token_ids(5, 16)
    skeleton = Skeleton(model.config, WeightsOf(model))

    def states(tokens: int) -> HiddenStates:
        return HiddenStates(skeleton, TokenRows(ids), CPU, tokens_per_batch=tokens)

    def advance(stream: HiddenStates, index: int, batches: int | None = None) -> None:
        block = skeleton.load_block(index, CPU)
        with torch.no_grad():
            for number, (part, hidden, call, _) in enumerate(stream.batches(index)):
                if number != batches:
                    stream.write(part, *hand_on(block, hidden, call))
        skeleton.release_block(index)

    found, expected = states(48), states(24)  # batches of 3 and 2 rows, of 1 row
    advance(found, 0)
    advance(expected, 0)
    found.mark()
    advance(found, 1, batches=1)
    found.put_back()
    found.halve_batches(skeleton)
    for stream in (found, expected):
        advance(stream, 1)
    assert found.is_row_by_row
    torch.testing.assert_close(current(found), current(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("spare", [True, False])
def test_what_is_overwritten_on_a_gpu_is_kept_there_where_it_is_little(
    spare: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marked_states, "is_spare", lambda *given: spare)
    states = torch.arange(12.0, device="cuda").reshape(4, 3)
    before, mark = states.clone(), marked_states.MarkedStates(states, {}, states.device)
    for number in range(2):  # what was written first is what counts
        mark.before_write(states, slice(1, 3))
        states[1:3] = float(number)
    assert mark._kept.is_cuda is spare
    assert torch.equal(mark.put_back()[0], before) and mark._kept is None


def test_fewer_tokens_where_memory_is_short() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    llama = BlockMemory(weights=810 << 20, statistics=700 << 20, search=2 << 30, token=312_000)
    assert fitting_tokens(llama, cpu, None) == fitting_tokens(llama, cpu, 16e9) == 4096
    assert fitting_tokens(llama, gpu, 80e9) == 8192
    assert fitting_tokens(llama, gpu, 11e9) == 8192
    assert fitting_tokens(llama, gpu, 7e9) == 4096
    assert fitting_tokens(llama, gpu, 1e9) == 1  # whose batches are single rows
    small = BlockMemory(weights=10 << 20, statistics=10 << 20, search=50 << 20, token=30_000)
    assert fitting_tokens(small, gpu, 80e9) == 32768
    qwen = replace(llama, token=111_000, experts=128, is_bound_by_calls=True)  # calls of each expert, in every batch
    assert fitting_tokens(qwen, gpu, 80e9) == 65536
    assert fitting_tokens(replace(qwen, is_bound_by_calls=False), gpu, 80e9) == 16384
    assert fitting_tokens(replace(qwen, token=450_000), gpu, 80e9) == 16384
    assert fitting_tokens(qwen, gpu, 9e9) == 16384
    assert fitting_tokens(qwen, cpu, None) == 4096


def test_the_memory_of_a_block_is_counted_from_the_plan() -> None:
    context = block_context(tiny_model("llama"))
    found = block_memory(context.skeleton, context.plan, context.recipe)
    assert found.weights == 4 * sum(value.numel() for value in context.parameters.values())
    group_size = context.plan.group_size
    assert found.statistics == 4 * (3 * 64 + 96) * group_size  # blocks of H are enough here
    assert not found.is_bound_by_calls  # of a block without experts
    gptq = block_memory(context.skeleton, context.plan, replace(context.recipe, rounding="gptq"))
    assert gptq.statistics == 4 * (3 * 64**2 + 96**2)
    assert found.with_tokens(10) - found.with_tokens(9) == 4 * (3 * 64 + (3 * 64 + 96) + (3 * 64 + 2 * 32 + 2 * 96))
