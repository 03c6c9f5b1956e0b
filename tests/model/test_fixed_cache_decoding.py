"""Text written step by step into a cache of fixed size: what the plain model says, or a reason and `generate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, tiny_model
from torch import Tensor

from awqkit.model import fixed_cache_decoding, generate
from awqkit.model.fixed_cache_decoding import Decoding, decode_tokens
from awqkit.model.generate import generate_rows
from awqkit.model.transformers_bridge import sample_tokens
from awqkit.numerics.draw import draw_chances, drawn_tokens

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
NUM_TOKENS = 20


def _begun(rows: int = 6) -> Tensor:
    """Passages of three tokens to go on with."""
    return torch.randint(3, VOCABULARY, (rows, 3), generator=torch.Generator().manual_seed(1))


def _decoded(model: Any, seed: int = 5, step: Callable[[int], None] = lambda done: None) -> Tensor | str:
    return decode_tokens(model, _begun(), NUM_TOKENS, seed, step)


@pytest.mark.parametrize(
    ("family", "choices"),
    [("llama", {}), ("llama", {"num_key_value_heads": 4}), ("gemma2", {"sliding_window": 64}), ("opt", {})],
)
def test_tokens_are_drawn_from_what_the_model_says_without_a_cache(family: str, choices: dict[str, int]) -> None:
    model, told = tiny_model(family, **choices), []
    written = _decoded(model, step=told.append)
    with torch.no_grad():
        logits = model(input_ids=written[:, :-1], use_cache=False).logits[:, 2:].double()
    chances = draw_chances(NUM_TOKENS, len(written), 5)
    drawn = [drawn_tokens(logits[:, done], chances[done]) for done in range(NUM_TOKENS)]
    assert torch.equal(written, torch.cat([_begun(), *drawn], dim=1))
    assert told == list(range(1, NUM_TOKENS + 1))


def test_it_writes_what_generate_does_and_the_seed_decides_what() -> None:
    model = tiny_model("llama")
    one, again, other = (_decoded(model, seed) for seed in (5, 5, 6))
    assert torch.equal(one, sample_tokens(model, _begun(), NUM_TOKENS, 5, lambda done: None))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_it_begins_anew_after_the_steps_that_a_capture_takes() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        decoding = Decoding(model, _begun(), NUM_TOKENS, 5)
        for _ in range(4):
            decoding._step()
        decoding.restart()
        decoding.write(lambda done: None)
        assert decoding.error() < 1e-5
    assert torch.equal(decoding.tokens, _decoded(model))


def _without_cache(model: Any) -> Any:
    """The model as one whose cache is taken and left unread."""
    forward = model.forward
    model.forward = lambda input_ids, **_: forward(input_ids=input_ids)
    return model


def _refusing(model: Any) -> Any:
    """The model as one that knows neither caches nor positions, but what `generate` calls it with."""
    forward = model.forward

    def called(input_ids: Tensor, attention_mask: Tensor | None = None, **choices: Any) -> Any:
        if attention_mask is not None and attention_mask.dim() == 4:
            raise TypeError("a mask of four dimensions?")
        return forward(input_ids=input_ids, attention_mask=attention_mask, **choices)

    model.forward = called
    return model


def _at_one_position(model: Any) -> Any:
    """The model as one that keeps count of positions in its own way."""
    forward = model.forward

    def called(position_ids: Tensor | None = None, **given: Any) -> Any:
        stuck = None if position_ids is None else torch.zeros_like(position_ids)
        return forward(position_ids=stuck, **given)

    model.forward = called
    return model


def test_a_model_that_cannot_be_called_so_says_why() -> None:
    assert "looks back at 8 tokens" in _decoded(tiny_model("gemma2"))
    assert _decoded(_refusing(tiny_model("llama"))) == "TypeError: a mask of four dimensions?"
    for broken in (_without_cache, _at_one_position):
        assert "changes the log probabilities" in _decoded(broken(tiny_model("llama")))


@pytest.mark.parametrize(("change", "lines"), [(lambda model: model, 0), (_refusing, 1), (_at_one_position, 1)])
def test_rows_are_the_same_whoever_writes_them_and_a_refusal_is_told_once(
    change: Callable[[Any], Any], lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setitem(generate._AT_ONCE, "cpu", 2)

    def rows() -> Tensor:
        model = change(tiny_model("llama"))
        return generate_rows(model, VOCABULARY, num_rows=5, seq_len=20, seed=0, start_tokens=(1,), told=told.append)

    expected = rows()
    monkeypatch.setattr(generate, "_REPLAYED_ON", ("cpu",))
    assert not told and torch.equal(rows(), expected)
    assert ["without CUDA graphs" in line for line in told] == [True] * lines


def test_memory_that_runs_out_halves_the_passages_also_within_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, step = [], Decoding._step

    def short_of_memory(decoding: Decoding) -> None:
        sizes.append(len(decoding.tokens))
        if len(decoding.tokens) > 2:
            try:
                raise torch.OutOfMemoryError("no room")
            finally:  # as torch does at the end of a capture that is broken
                raise RuntimeError("the capture was invalidated")
        step(decoding)

    monkeypatch.setattr(Decoding, "_step", short_of_memory)
    monkeypatch.setattr(generate, "_REPLAYED_ON", ("cpu",))
    monkeypatch.setitem(generate._AT_ONCE, "cpu", 4)
    told: list[str] = []
    rows = generate_rows(tiny_model("llama"), VOCABULARY, num_rows=3, seq_len=18, seed=0, told=told.append)
    assert rows.shape == (3, 18) and list(dict.fromkeys(sizes)) == [3, 2, 1] and not told


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_step_on_a_gpu_writes_what_an_eager_one_does(dtype: torch.dtype) -> None:
    model, rows = tiny_model("llama").to("cuda", dtype), _begun().cuda()
    with torch.no_grad():
        eager, captured = (Decoding(model, rows, NUM_TOKENS, 5) for _ in range(2))
        captured.capture()
        for decoding in (eager, captured):
            decoding.write(lambda done: None)
        assert captured.error() < fixed_cache_decoding._ROUNDING[dtype]
    assert torch.equal(captured.tokens, eager.tokens)


@needs_cuda
def test_a_model_that_waits_for_the_gpu_says_so_and_leaves_it_usable() -> None:
    model = tiny_model("llama").cuda()
    forward = model.forward

    def waiting(input_ids: Tensor, **given: Any) -> Any:
        assert int(input_ids.max()) < VOCABULARY
        return forward(input_ids=input_ids, **given)

    model.forward = waiting
    reason = decode_tokens(model, _begun().cuda(), NUM_TOKENS, 5, lambda done: None)
    assert isinstance(reason, str) and reason.startswith("RuntimeError")
    assert generate_rows(model, VOCABULARY, num_rows=3, seq_len=20, seed=0).shape == (3, 20)
