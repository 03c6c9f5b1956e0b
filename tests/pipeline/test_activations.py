"""Hidden states that stream through the blocks are the model's own, and padding leaves no trace in statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_contexts import CPU, GROUP, block_context, hidden_states, run_on, token_ids
from tiny_models import WIDTH, WeightsOf, tiny_model
from torch import Tensor

from awqkit import Recipe
from awqkit.model.block_calls import run_block
from awqkit.model.skeleton import Skeleton
from awqkit.numerics.statistics import Statistics
from awqkit.pipeline import block_step
from awqkit.pipeline.activations import HiddenStates
from awqkit.pipeline.observe_block import observe


def _advance(skeleton: Skeleton, states: HiddenStates, index: int) -> None:
    block = skeleton.load_block(index, CPU)
    with torch.no_grad():
        for part, hidden, call, _ in states.batches(index):
            states.write(part, run_block(block, hidden, call))
    skeleton.release_block(index)


def _current(states: HiddenStates, index: int) -> Tensor:
    return torch.cat([hidden.clone() for _, hidden, _, _ in states.batches(index)])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3", "opt", "starcoder2", "cohere", "phi3"])
def test_streamed_hidden_states_are_those_of_the_model(family: str) -> None:
    """Gemma's two blocks get different masks (a sliding window of 8 tokens, then none)."""
    model, ids = tiny_model(family), token_ids(3, 20)
    skeleton = Skeleton(model.config, WeightsOf(model))
    states = hidden_states(skeleton, ids)
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(_current(states, 0), expected[0], rtol=1e-5, atol=1e-5)
        _advance(skeleton, states, 0)
        torch.testing.assert_close(_current(states, 1), expected[1], rtol=1e-4, atol=1e-4)
        _advance(skeleton, states, 1)
        decoder = model.base_model.decoder if family == "opt" else model.base_model
        norm = decoder.final_layer_norm if family == "opt" else decoder.norm
        torch.testing.assert_close(norm(_current(states, 1)), expected[-1], rtol=1e-4, atol=1e-4)


def test_many_rows_are_visited_in_batches_that_together_are_the_rows() -> None:
    model, ids = tiny_model("llama"), token_ids(90, 64)
    skeleton = Skeleton(model.config, WeightsOf(model))
    states = hidden_states(skeleton, ids)
    parts = [part for part, *_ in states.batches(0)]
    assert len(parts) > 1
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(90))
    assert len({part.stop - part.start for part in parts}) > 1  # the last batch is smaller
    _advance(skeleton, states, 0)
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(_current(states, 1), expected, rtol=1e-4, atol=1e-4)


def test_padded_rows_keep_their_own_mask_in_every_batch() -> None:
    model, ids = tiny_model("gemma3"), token_ids(90, 64)
    mask = torch.ones(90, 64, dtype=torch.bool)
    mask[::3, 40:] = False
    mask[70:, 20:] = False
    skeleton = Skeleton(model.config, WeightsOf(model))
    states = hidden_states(skeleton, ids, mask)
    masks = [(part, found) for part, _, _, found in states.batches(0)]
    assert len(masks) > 1
    assert all(torch.equal(found, mask[part]) for part, found in masks)
    _advance(skeleton, states, 0)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(_current(states, 1)[mask], expected[mask], rtol=1e-4, atol=1e-4)


def test_the_source_is_not_needed_for_blocks_that_have_been_released() -> None:
    model = tiny_model("llama")
    skeleton = Skeleton(model.config, WeightsOf(model))
    block = skeleton.load_block(0, CPU)
    assert {value.device.type for value in block.parameters()} == {"cpu"}
    skeleton.release_block(0)
    assert {value.device.type for value in block.parameters()} == {"meta"}


def _statistics(family: str, ids: Tensor, mask: Tensor | None) -> list[dict[str, Statistics]]:
    model = tiny_model(family)
    found = []
    skeleton = Skeleton(model.config, WeightsOf(model))
    states = hidden_states(skeleton, ids, mask)
    for index in range(2):
        found.append(observe(block_context(model, index), states))
    return found


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_padded_rows_give_the_statistics_of_the_same_rows_without_padding(family: str) -> None:
    ids = token_ids(4, 12)
    padded = torch.zeros(4, 20, dtype=torch.int64)
    padded[:, :12] = ids
    mask = torch.zeros(4, 20, dtype=torch.bool)
    mask[:, :12] = True
    plain, masked = _statistics(family, ids, None), _statistics(family, padded, mask)
    unmasked = _statistics(family, padded, None)
    for a, b, c in zip(plain, masked, unmasked, strict=True):
        assert a.keys() == b.keys()
        for first in a:
            assert b[first].token_count == a[first].token_count == 48
            assert c[first].token_count == 80
            torch.testing.assert_close(b[first].mean_abs, a[first].mean_abs, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(b[first].max_abs, a[first].max_abs, rtol=1e-4, atol=1e-5)
            scale = float(a[first].gram.abs().max())
            torch.testing.assert_close(b[first].gram, a[first].gram, rtol=1e-4, atol=1e-5 * scale)
            assert not torch.allclose(c[first].gram, a[first].gram, rtol=1e-2, atol=1e-3 * scale)


def test_statistics_are_those_of_the_inputs_that_the_linears_really_read() -> None:
    model, ids = tiny_model("llama"), token_ids(5, 16)
    found = _statistics("llama", ids, None)
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.__setitem__(name, inputs[0]))
        for name, module in model.model.layers.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    assert set(found[0]) == {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"}
    for index, statistics in enumerate(found):
        for first, entry in statistics.items():
            x = seen[f"{index}.{first}"].reshape(-1, seen[f"{index}.{first}"].shape[-1]).double()
            gram = x.t() @ x
            torch.testing.assert_close(entry.gram.double(), gram, rtol=1e-3, atol=1e-4 * float(gram.max()))
    assert found[0]["self_attn.q_proj"].gram.shape == (WIDTH, WIDTH)


@pytest.mark.parametrize(
    ("recipe", "sampled"),
    [
        (Recipe.preset("fast", group_size=GROUP), False),
        (Recipe.preset("balanced", group_size=GROUP, generated=0.0, tuning_epochs=0), False),
        (Recipe.method("smoothquant"), True),
    ],
    ids=["fast", "balanced", "smoothquant"],
)
def test_tokens_themselves_are_kept_where_a_recipe_looks_at_them(
    recipe: Recipe, sampled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bool] = []

    def seen(*given: Any, **choices: Any) -> Any:
        statistics = observe(*given, **choices)
        found.extend(statistics[first].sample is not None for first in statistics)
        return statistics

    monkeypatch.setattr(block_step, "observe", seen)
    run_on(tiny_model("llama"), tmp_path, recipe)
    assert found and set(found) == {sampled}
