"""What several blocks compute with stays as it is in all of them; the rest of these blocks is quantized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_contexts import GROUP, block_context, run_on, written
from tiny_models import tiny_model

from awqkit import Recipe, load
from awqkit.errors import UsageError
from awqkit.model.block_list import shared_parameters

SHARED = "shared_transformer."


def test_a_shared_linear_is_kept_with_its_reason_and_no_fold_changes_what_is_shared() -> None:
    model = tiny_model("zamba2")
    context = block_context(model, index=3)
    shared = context.skeleton.shared_by(3)
    assert set(shared.values()) == {(1, 3)} and all(name.startswith(SHARED) for name in shared)
    reasons = {name: linear.keep for name, linear in context.block_plan.linears.items()}
    assert {name for name, reason in reasons.items() if reason is None} == {
        "linear", "mamba_decoder.mamba.in_proj", "mamba_decoder.mamba.out_proj"
    }  # fmt: skip
    assert reasons["shared_transformer.self_attn.q_proj"] == "shared by blocks 1 and 3: stays in full precision"
    assert context.structure.folds
    for fold in context.structure.folds:
        changed = {*fold.producer, *(context.structure.linear(name).weight for name in fold.consumers)}
        assert not changed & set(shared)
    refused = {refusal.label: refusal.reason for refusal in context.structure.refusals}
    assert "which other blocks compute with as well" in refused["shared_transformer.pre_ff_layernorm"]


def test_shared_tensors_are_written_once_as_they_were(tmp_path: Path) -> None:
    model = tiny_model("zamba2")
    done = run_on(model, tmp_path, Recipe.preset("fast", group_size=GROUP))
    source, found = written(tmp_path / "source"), written(done.directory)
    kept = {name for name in source if f".{SHARED}" in name}
    assert kept and kept == {name for name in found if f".{SHARED}" in name}
    assert all(torch.equal(source[name], found[name]) for name in kept)
    loaded = load(done.directory, dtype=torch.float32, device="cpu")
    blocks = loaded.model.layers
    assert (
        blocks[1].shared_transformer.feed_forward.down_proj.weight
        is blocks[3].shared_transformer.feed_forward.down_proj.weight
    )


def test_blocks_that_share_nothing_have_nothing_shared() -> None:
    assert shared_parameters(tiny_model("llama").model.layers) == [{}, {}]


def test_a_model_of_one_block_called_again_and_again_has_nothing_to_quantize(monkeypatch: pytest.MonkeyPatch) -> None:
    from awqkit.model import skeleton

    empty_model = skeleton.empty_model

    def one_block(*arguments: object, **choices: object) -> object:
        model = empty_model(*arguments, **choices)
        model.model.layers[1] = model.model.layers[0]
        return model

    monkeypatch.setattr(skeleton, "empty_model", one_block)
    with pytest.raises(UsageError, match=r"nothing is left to quantize.*shared by blocks 0 and 1"):
        block_context(tiny_model("llama"))
