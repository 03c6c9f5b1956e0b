"""`evaluate` refuses what it cannot measure in one line; above all it never scores weights that were made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_folders import change_config, change_tensors, make_model

WORDS = ("evaluate", "model", "--text", "text.txt", "--seq-len", "32", "--max-windows", "2")


@pytest.fixture
def refused(place, awqkit):
    """The one error line that `evaluate` ends with; the windows that were found may be named before."""

    def run(*flags: object) -> str:
        outcome = awqkit(*WORDS, *flags)
        *others, line = outcome.err.splitlines()
        assert (outcome.code, outcome.out) == (1, ""), outcome.err
        assert all(other.startswith("2 of 103 windows") for other in others), outcome.err
        assert line.startswith("awqkit: error: ")
        return line.removeprefix("awqkit: error: ")

    return run


def test_a_model_is_measured(awqkit, place):
    outcome = awqkit(*WORDS, "--reference", "model", "--json", "scores.json")
    assert outcome.code == 0
    scores = json.loads(Path("scores.json").read_text())
    assert (scores["tokens"], scores["kl"], scores["top1_agreement"]) == (62, 0.0, 1.0)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--text", "no.txt"), "no.txt: no such file; "),
        (("--seq-len", "5000"), "text.txt: 3202 tokens do not fill one window of 5000; give more text"),
        (("--reference", "./no"), "./no: no such directory; "),
    ],
)
def test_what_is_missing(refused, flags, line):
    assert refused(*flags).startswith(line)


def test_a_tensor_that_is_missing_is_not_made_up(refused, place):
    change_tensors(place.model, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "config.json asks for, model.layers.1.mlp.up_proj.weight is missing; fetch " in refused()


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"model_type": "zzz9"}, "transformers cannot use it ("),
        ({"model_type": "t5"}, "model_type 't5' is an encoder-decoder model"),
        ({"model_type": "vit"}, "transformers has no causal language model for model_type 'vit'"),
        ({"hidden_size": 32}, "transformers cannot build the model that config.json describes ("),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantized by 'gptq'; only awq, compressed-tensors can be read",
        ),
    ],
)
def test_models_that_cannot_be_loaded(refused, place, values, found):
    change_config(place.model, **values)
    assert found in refused()


def test_a_tokenizer_of_another_model(refused, place):
    change_config(place.model, vocab_size=1000)
    key = "model.embed_tokens.weight"
    change_tensors(place.model, lambda tensors: tensors.update({key: tensors[key][:1000].contiguous()}))
    assert "outside the model's vocabulary of 1000; the tokenizer is not this model's" in refused()


def test_a_reference_with_another_vocabulary(refused, place):
    make_model(place.root / "other", vocab_size=4100)
    line = refused("--reference", "other")
    assert line.startswith("the reference has a vocabulary of 4100 tokens, the model one of 4096; ")


def test_a_perplexity_that_is_no_number_is_explained(awqkit, place):
    key = "model.layers.1.mlp.up_proj.weight"
    change_tensors(place.model, lambda tensors: tensors[key].fill_(torch.nan))
    outcome = awqkit(*WORDS)
    assert "caution: the perplexity is no number: the weights hold NaN or inf" in outcome.err
