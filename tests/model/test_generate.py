"""Text that a model writes itself: its distribution, its rows, its seeds."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from awqkit.model import generate
from awqkit.model.generate import PASSAGE, generate_rows


def _rows(model: torch.nn.Module, **choices: int) -> Tensor:
    asked = {"num_rows": 3, "seq_len": 20, "seed": 0, **choices}
    return generate_rows(model, model.config.vocab_size, **asked)


def test_tokens_follow_the_models_own_distribution() -> None:
    """Their mean surprise is the mean entropy of what the model expects, which greedy or cut sampling would miss."""
    model = tiny_model("llama", dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(30.0)
        rows = _rows(model, num_rows=200, seq_len=24, seed=3)
        expected = model(rows).logits[:, :-1].log_softmax(dim=-1)
    surprise = -expected.gather(-1, rows[:, 1:, None])
    entropy = -(expected.exp() * expected).sum(dim=-1)
    assert entropy.mean() < 0.9 * torch.log(torch.tensor(float(model.config.vocab_size)))
    assert surprise.mean() == pytest.approx(float(entropy.mean()), rel=0.03)


def test_first_tokens_are_of_the_whole_vocabulary() -> None:
    model = tiny_model("llama")
    first = _rows(model, num_rows=400, seq_len=1)[:, 0]
    assert first.min() < 0.05 * model.config.vocab_size and first.max() > 0.95 * model.config.vocab_size


def test_rows_are_passages_after_the_start_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = tiny_model("llama"), []
    sample = generate.sample_tokens

    def watched(model: object, rows: Tensor, num_tokens: int, *rest: object) -> Tensor:
        asked.append((tuple(rows.shape), num_tokens))
        assert bool((rows[:, :2] == torch.tensor([7, 8])).all())
        return sample(model, rows, num_tokens, *rest)

    monkeypatch.setattr(generate, "sample_tokens", watched)
    monkeypatch.setattr(generate, "PASSAGE", 16)
    rows = generate_rows(model, 64, num_rows=3, seq_len=40, seed=0, start_tokens=(7, 8))
    assert rows.shape == (3, 40) and rows.dtype == torch.int64
    assert rows[:, :2].tolist() == [[7, 8]] * 3
    assert asked == [((9, 3), 15)]  # three passages of 16 for 38 tokens
    assert PASSAGE == 128


def test_the_seed_decides_and_torchs_own_state_stays() -> None:
    model = tiny_model("llama")
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, again, other = (_rows(model, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_end_of_a_text_ends_nothing() -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    model.generation_config.max_length = 3
    rows = _rows(model)
    assert rows.shape == (3, 20) and rows[:, 10:].unique().numel() > 5
    assert model.generation_config.max_length == 3


def test_steps_are_told_and_a_full_device_gets_fewer_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes, told = tiny_model("llama"), [], []
    sample = generate.sample_tokens

    def short_of_memory(model: object, rows: Tensor, *rest: object) -> Tensor:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("no room")
        return sample(model, rows, *rest)

    monkeypatch.setitem(generate._AT_ONCE, "cpu", 8)
    monkeypatch.setattr(generate, "sample_tokens", short_of_memory)
    rows = generate_rows(model, 64, num_rows=5, seq_len=6, seed=0, step=lambda *now: told.append(now))
    assert rows.shape == (5, 6) and sizes == [5, 4, 2, 2, 1]
    assert told[-1] == (25, 25) and told == sorted(told)
    monkeypatch.setattr(generate, "sample_tokens", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(torch.OutOfMemoryError):
        generate_rows(model, 64, num_rows=5, seq_len=6, seed=0)
