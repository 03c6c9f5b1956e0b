"""`folds`: what a model's blocks are, from its weights and from its config alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from awqkit import folds
from awqkit.errors import CheckpointError, ModelError

EXPECTED = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "self_attn.v_proj": ("self_attn.o_proj",),
    "mlp.up_proj": ("mlp.down_proj",),
}


@pytest.mark.parametrize("random_weights", [False, True])
def test_a_llama_has_one_kind_of_block_with_four_exact_folds(place, random_weights):
    if random_weights:
        for file in place.model.glob("*.safetensors"):
            file.unlink()
    found = folds(place.model, random_weights=random_weights)
    (kind,) = found.kinds
    assert (found.random_weights, found.num_blocks, kind.blocks) == (random_weights, 2, (0, 1))
    assert {fold.producer: fold.consumers for fold in kind.folds} == EXPECTED
    assert all(fold.exact and fold.proof_error <= 1e-5 for fold in kind.folds)
    assert set(kind.linears) == {name for names in EXPECTED.values() for name in names}
    assert (kind.refused, kind.unwatched) == ((), ())


def test_without_weights_the_line_says_what_is_missing(place):
    for file in place.model.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors file"):
        folds(place.model)


def test_an_encoder_is_refused(place):
    config = {"model_type": "bert", "vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2,
              "num_hidden_layers": 2, "intermediate_size": 64}  # fmt: skip
    Path(place.model, "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="a token sees the ones after it"):
        folds(place.model, random_weights=True)


def test_the_command_prints_producers_consumers_and_the_proof(awqkit, place):
    outcome = awqkit("folds", place.model, "--random", "--json", "found.json")
    assert outcome.code == 0
    lines = [" ".join(line.split()) for line in outcome.out.splitlines()]
    assert lines[0] == "model: 2 blocks of 1 kind, weights made up from the config"
    assert "model.layers.0, as blocks 0-1:" in lines
    assert "self_attn.v_proj -> self_attn.o_proj rows 32 0.0e+00 yes" in lines
    assert "kind of block 1/1" in outcome.err
    assert json.loads(Path("found.json").read_text())["kinds"][0]["folds"][0]["exact"] is True


def test_quiet_prints_nothing_but_the_result(awqkit, place):
    assert awqkit("folds", place.model, "--random", "--quiet").err == ""


def test_ranges_of_blocks_are_short():
    from awqkit.cli.folds import _ranges

    assert _ranges((0, 1, 2, 5, 7, 8)) == "0-2, 5, 7-8"
