"""Perplexity, KL and agreement against transformers' own loss and plain formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_model, token_rows
from torch import Tensor

from awqkit.evaluation.evaluate import Evaluation, evaluate_windows
from awqkit.evaluation.perplexity import perplexity, token_losses
from awqkit.numerics.divergence import kl_gradient, same_top1, token_kl

CPU = torch.device("cpu")
WINDOWS = torch.tensor(token_rows(7, 24))


def _score(model: Any, *, start_tokens: int = 1, reference: Any = None, windows: Tensor = WINDOWS) -> Evaluation:
    return evaluate_windows(model, windows, start_tokens, reference, CPU, lambda done: None)


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """Two models that differ, with heads that make their predictions sharp."""
    pair = tiny_model("llama"), tiny_model("llama", seed=1)
    for model in pair:
        model.lm_head.weight.data *= 6.0
    return pair


def test_perplexity_is_exp_of_transformers_own_loss(models: tuple[Any, Any]) -> None:
    found = _score(models[0])
    with torch.no_grad():
        loss = models[0](WINDOWS, labels=WINDOWS).loss
    torch.testing.assert_close(found.perplexity, math.exp(float(loss)), rtol=1e-5, atol=0)
    assert (found.tokens, found.windows) == (7 * 23, 7)
    assert (found.kl, found.top1_agreement) == (None, None)


@pytest.mark.parametrize(("start_tokens", "first_target"), [(0, 1), (1, 1), (2, 2), (3, 3)])
def test_start_tokens_are_read_but_never_predicted(
    start_tokens: int, first_target: int, models: tuple[Any, Any]
) -> None:
    found = _score(models[0], start_tokens=start_tokens)
    labels = WINDOWS.clone()
    labels[:, :first_target] = -100
    with torch.no_grad():
        loss = models[0](WINDOWS, labels=labels).loss
    assert found.tokens == 7 * (24 - first_target)
    torch.testing.assert_close(found.perplexity, math.exp(float(loss)), rtol=1e-5, atol=0)


def test_a_model_agrees_with_itself(models: tuple[Any, Any]) -> None:
    found = _score(models[0], reference=models[0])
    assert abs(found.kl) < 1e-6
    assert found.top1_agreement == 1.0


def test_kl_and_agreement_are_means_over_the_predicted_tokens(models: tuple[Any, Any]) -> None:
    model, reference = models
    found = _score(model, start_tokens=2, reference=reference)
    with torch.no_grad():
        q, p = (entry(WINDOWS).logits[:, 1:-1].double() for entry in (model, reference))
    expected = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum") / (7 * 22)
    torch.testing.assert_close(found.kl, float(expected), rtol=1e-5, atol=0)
    reverse = F.kl_div(p.log_softmax(-1), q.log_softmax(-1), log_target=True, reduction="sum") / (7 * 22)
    assert abs(found.kl - float(reverse)) > 1e-3  # the direction shows
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean()
    torch.testing.assert_close(found.top1_agreement, float(agreement))
    assert found.top1_agreement < 1.0


def test_batches_do_not_change_the_score_and_progress_counts_windows(
    models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from awqkit.evaluation import evaluate as module

    at_once = _score(models[0], reference=models[1])
    monkeypatch.setattr(module, "_LOGIT_BYTES", {"cpu": 4 * 192 * 24 * 3})
    done: list[int] = []
    batched = evaluate_windows(models[0], WINDOWS, 1, models[1], CPU, done.append)
    assert done == [3, 6, 7]
    torch.testing.assert_close(batched.perplexity, at_once.perplexity, rtol=1e-5, atol=0)
    torch.testing.assert_close(batched.kl, at_once.kl, rtol=1e-5, atol=0)
    assert batched.tokens == at_once.tokens


def test_token_kl_is_zero_only_between_equal_distributions() -> None:
    logits = torch.randn(4, 9)
    torch.testing.assert_close(token_kl(logits, logits + 3.0), torch.zeros(4), rtol=0, atol=1e-6)
    p, q = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    torch.testing.assert_close(float(token_kl(p, q)), expected, rtol=1e-5, atol=0)
    assert same_top1(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), torch.tensor([[0.0, 9.0], [0.0, 1.0]])).tolist() == [
        True,
        False,
    ]


def test_losses_in_bfloat16_are_summed_in_float32() -> None:
    logits, targets = torch.randn(2, 3, 50).to(torch.bfloat16), torch.randint(0, 50, (2, 3))
    found = token_losses(logits, targets)
    assert found.dtype == torch.float32
    expected = -logits.double().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(perplexity(6.0, 3), math.exp(2.0))


def test_json_has_the_promised_keys(models: tuple[Any, Any]) -> None:
    assert {"perplexity", "kl", "top1_agreement", "tokens"} <= set(_score(models[0]).to_json())


def test_the_gradient_of_the_kl_is_autograds() -> None:
    reference, logits = torch.randn(2, 3, 7), torch.randn(2, 3, 7, requires_grad=True)
    token_kl(reference, logits).sum().backward()
    torch.testing.assert_close(kl_gradient(reference, logits.detach()), logits.grad, rtol=1e-5, atol=1e-6)
