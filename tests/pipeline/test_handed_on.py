"""What blocks hand on beside hidden states goes with every stream, from block to block, forward and back."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from tiny_contexts import CPU, GROUP, current, hidden_states, quantized_blocks, sampled_loss, token_ids
from tiny_models import HANDING_ON, WeightsOf, tiny_model
from torch import Tensor, nn

from awqkit import Recipe
from awqkit.model.block_calls import hand_on, leaves
from awqkit.model.skeleton import Skeleton
from awqkit.numerics.grid import dequantize
from awqkit.pipeline.activations import HiddenStates, TokenRows
from awqkit.pipeline.captured_pass import BlocksPass
from awqkit.pipeline.end_gradients import measure_end_gradients
from awqkit.pipeline.sensitivity import measure_sensitivity
from awqkit.pipeline.tuning_stage import tunable_block

FAMILIES = [*HANDING_ON]
ROWS, HELD_OUT = token_ids(12, 24), token_ids(3, 24, seed=1)


def _outputs(model: Any, paths: list[str], ids: Tensor, *, keep_gradient: bool = False) -> tuple[list[Tensor], Tensor]:
    """The hidden states that blocks of the whole model give, and its logits."""
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if keep_gradient:
            hidden.retain_grad()
        found.append(hidden)

    handles = [model.get_submodule(path).register_forward_hook(keep) for path in paths]
    logits = model(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return found, logits


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _paths(skeleton: Skeleton) -> list[str]:
    return [skeleton.block_path(index) for index in range(skeleton.num_blocks)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_batch_streams_as_in_the_model_with_arguments_of_its_own(family: str) -> None:
    model, ids = tiny_model(family), token_ids(5, 16)
    skeleton = Skeleton(model.config, WeightsOf(model))
    states = HiddenStates(skeleton, TokenRows(ids), CPU, tokens_per_batch=32)  # three batches, two of them as long
    carried = 0
    with torch.no_grad():
        expected, logits = _outputs(model, _paths(skeleton), ids)
        for index, output in enumerate(expected):
            block, other = skeleton.load_block(index, CPU), states.copy()
            for part, hidden, call, _ in states.batches(index):
                states.write(part, *hand_on(block, hidden, call))
                carried += len(leaves(list(states.beside(part))))
            assert _distance(current(states), output) < 1e-5
            for part, hidden, call, _ in other.batches(index):  # the copy is where it was, with what goes with it
                other.write(part, *hand_on(block, hidden, call))
            assert torch.equal(current(other), current(states))
            skeleton.release_block(index)
        with skeleton.head(CPU) as head:
            assert _distance(head(ids, current(states), None), logits) < 1e-5
    assert carried > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_go_back_by_what_was_handed_on_as_well(family: str) -> None:
    model, ids = tiny_model(family), token_ids(3, 16)
    skeleton = Skeleton(model.config, WeightsOf(model))
    found = measure_end_gradients(skeleton, TokenRows(ids), CPU, 0, lambda block: None)
    outputs, logits = _outputs(model, _paths(skeleton), ids, keep_gradient=True)
    sampled_loss(logits.float(), None, 0).backward()
    for index, output in enumerate(outputs):
        assert _distance(found.at(index).float(), output.grad) < 0.06  # kept in bfloat16


def test_sensitivity_counts_what_only_a_later_block_reads() -> None:
    """Gemma 4's second block gives its keys and values to the last one; with no gradient at its hidden states, only
    what reads these is felt."""
    model, ids = tiny_model("gemma4"), token_ids(3, 16)
    contexts = quantized_blocks(model, Recipe.preset("fast", group_size=GROUP), ids)
    next(contexts)
    context, _, _ = next(contexts)
    skeleton = context.skeleton
    gradients = measure_end_gradients(
        Skeleton(model.config, WeightsOf(model)), TokenRows(ids), CPU, 0, lambda block: None
    )
    rows = hidden_states(skeleton, ids)
    with torch.no_grad():
        first = deepcopy(model.get_submodule(skeleton.block_path(0)))
        for part, hidden, call, _ in rows.batches(0):
            rows.write(part, *hand_on(first, hidden, call))
    nothing = torch.zeros_like(gradients.at(1))
    found = measure_sensitivity(context, rows, nothing, lambda part: gradients.beside(1, part))
    felt = {name for name, gram in found.items() if not torch.equal(gram, torch.eye(len(gram)))}
    assert felt == {"self_attn.k_proj", "self_attn.v_proj"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_quantized_stream_goes_on_with_what_its_own_blocks_hand_on(family: str) -> None:
    original = tiny_model(family)
    folded, recipe = deepcopy(original), Recipe.preset("balanced", group_size=GROUP, bits=4)
    for context, result, streams in quantized_blocks(original, recipe, ROWS, HELD_OUT):
        target = dict(folded.get_submodule(context.block_plan.path).named_parameters())
        for name, value in result.stored.items():
            view = target[name] if name in target else target[name.partition("[")[0]][int(name.partition("[")[2][:-1])]
            view.data.copy_(value.to(torch.bfloat16).float())
        for name, weight in result.quantized.items():
            parameter, _, number = context.structure.linear(name).weight.partition("[")
            value = dequantize(weight.codes, weight.grid)
            (target[parameter][int(number[:-1])] if number else target[parameter]).data.copy_(value)
        with torch.no_grad():
            for stream, ids in ((streams.calibration, ROWS), (streams.held_out, HELD_OUT)):
                (expected,), _ = _outputs(folded, [context.block_plan.path], ids)
                # a router's columns may be rounded in the file, which the stream does not do
                assert _distance(current(stream.quantized), expected) < 1e-2
                (expected,), _ = _outputs(original, [context.block_plan.path], ids)
                assert _distance(current(stream.original), expected) < 1e-5
                assert _distance(current(stream.quantized), current(stream.original)) > 1e-2


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_tuned_blocks_hand_on_differentiably(family: str, recompute: bool) -> None:
    model, recipe = tiny_model(family), Recipe.preset("fast", group_size=GROUP, tuning="rows")
    blocks, last = [], None
    for context, result, _ in quantized_blocks(model, recipe, ROWS[:4]):
        blocks.append(tunable_block(context, result))
        last = context
    rows = hidden_states(last.skeleton, ROWS[:4])
    run, (_, first, calls, _) = BlocksPass(blocks, recompute=recompute), rows.batch(0)
    with torch.enable_grad():
        hidden = run.forward(first, calls)
    run.backward(hidden, 2 * hidden.detach())
    assert all(bool(leaf.grad.isfinite().all()) for block in blocks for leaf in block.leaves if leaf.grad is not None)
    streams = hidden_states(last.skeleton, ROWS[:4])
    for index, block in enumerate(blocks):
        with torch.no_grad():
            for part, states, call, _ in streams.batches(index):
                streams.write(part, *block(states, call))
    assert _distance(hidden.detach(), current(streams)) < 1e-5
