"""The pass through all blocks that tuning takes: as CUDA graphs where that can be, with the same gradients anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import tiny_contexts
import torch
from tiny_contexts import CPU, GROUP, hidden_states, quantized_blocks, token_ids
from tiny_models import tiny_model
from torch import Tensor

from awqkit import Recipe
from awqkit.model.block_calls import BlockCall
from awqkit.pipeline import captured_pass
from awqkit.pipeline.activations import HiddenStates
from awqkit.pipeline.captured_pass import BlocksPass
from awqkit.pipeline.tunable_block import TunableBlock
from awqkit.pipeline.tune import STEPPING
from awqkit.pipeline.tuning_stage import tunable_block

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
RECIPE = Recipe.preset("fast", group_size=GROUP, bits=3, format="compressed-tensors")


def _tunable(tuning: str, family: str = "llama") -> tuple[list[TunableBlock], list[HiddenStates]]:
    """The blocks of a tiny model, and three batches: two that are called alike, and a smaller one."""
    blocks, skeleton, recipe = [], None, replace(RECIPE, tuning=tuning)
    for context, result, _ in quantized_blocks(tiny_model(family), recipe, token_ids(4, 24)):
        blocks.append(tunable_block(context, result))
        skeleton = context.skeleton
    for block in blocks:
        block.hold_weights()
    assert skeleton is not None
    return blocks, [hidden_states(skeleton, token_ids(rows, 24, seed)) for rows, seed in ((4, 0), (4, 1), (3, 2))]


def _step(run: BlocksPass, blocks: Sequence[TunableBlock], rows: HiddenStates) -> list[Tensor]:
    """The output of one pass and the gradients that its leaves get, copied."""
    _, hidden, calls, _ = rows.batch(0)
    with torch.enable_grad():
        output = run.forward(hidden, calls)
    gradient = torch.sin(torch.arange(output.numel(), device=output.device).reshape(output.shape).float())
    run.backward(output, gradient)
    leaves = [leaf for block in blocks for leaf in block.leaves]
    found = [output.detach().clone(), *(leaf.grad.clone() for leaf in leaves)]
    for leaf in leaves:
        leaf.grad = None
    return found


@needs_cuda
@pytest.mark.parametrize("tuning", STEPPING)
def test_a_captured_pass_on_a_gpu_gives_what_an_eager_one_does(tuning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_contexts, "CPU", torch.device("cuda"))
    blocks, batches = _tunable(tuning)
    eager, captured = BlocksPass(blocks), BlocksPass(blocks)
    _, hidden, calls, _ = batches[0].batch(0)
    captured.capture(hidden, calls)
    assert captured._captured is not None
    assert [captured._captured.takes(*rows.batch(0)[1:3]) for rows in batches] == [True, True, False]
    for moved in (0.0, 0.1):  # what a step moves is read anew
        for block in blocks:
            for leaf in block.leaves:
                leaf.data += moved
        for rows in (*batches, batches[0]):
            for one, other in zip(_step(captured, blocks, rows), _step(eager, blocks, rows), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@needs_cuda
def test_a_model_that_waits_for_the_gpu_goes_on_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_contexts, "CPU", torch.device("cuda"))
    blocks, (rows, *_) = _tunable("rows")
    expected, run = _step(BlocksPass(blocks), blocks, rows), BlocksPass(blocks)
    through = captured_pass._through

    def waiting(*given: object, **choices: object) -> Tensor:
        output = through(*given, **choices)
        return output * float(output.isfinite().all())

    stream = torch.cuda.current_stream()
    monkeypatch.setattr(captured_pass, "_through", waiting)
    run.capture(*rows.batch(0)[1:3])
    assert run._captured is None
    assert torch.cuda.current_stream() == stream and torch.cuda.get_sync_debug_mode() == 0
    for one, other in zip(_step(run, blocks, rows), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_on_a_cpu_nothing_is_captured() -> None:
    blocks, (rows, *_) = _tunable("rows")
    assert rows.device == CPU
    expected, run = _step(BlocksPass(blocks), blocks, rows), BlocksPass(blocks)
    assert run.capture(*rows.batch(0)[1:3]) is None
    assert all(torch.equal(one, other) for one, other in zip(_step(run, blocks, rows), expected, strict=True))


def test_a_capture_that_fails_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, (rows, *_) = _tunable("rows")
    expected, run = _step(BlocksPass(blocks), blocks, rows), BlocksPass(blocks)

    def refused(*given: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(captured_pass, "_CapturedPass", refused)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    _, hidden, calls, _ = rows.batch(0)
    assert "stream is capturing" in run.capture(_OnAGpu(hidden), calls)
    assert all(torch.equal(one, other) for one, other in zip(_step(run, blocks, rows), expected, strict=True))


class _OnAGpu:
    """Hidden states that say that they are on a GPU."""

    def __init__(self, hidden: Tensor) -> None:
        self.shape, self.device = hidden.shape, torch.device("cuda")


def test_calls_that_pass_the_same_are_told_from_others() -> None:
    def call(scale: float = 1.0, flag: object = False, rows: int = 1) -> BlockCall:
        tables = (torch.ones(rows, 3), scale * torch.ones(rows, 3))
        return BlockCall((None, torch.arange(3)), {"tables": tables, "flag": flag, "beside": {"mask": None}})

    assert call().passes_the_same(call())
    other = [call(2.0), call(flag=True), call(flag=0), call(rows=2), call(flag=torch.zeros(())), call(flag=object())]
    assert not any(call().passes_the_same(each) for each in other)
    assert not call(flag=object()).passes_the_same(call(flag=object()))
    assert not call().passes_the_same(replace(call(), hands=(1,)))
