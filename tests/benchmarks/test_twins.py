"""A twin computes what the original computes, and differs where it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import FAMILIES, save_tiny, tiny_model, token_rows
from twins import LARGEST, SMALLEST, compare, table_lines, write_twin

# float32 tensors of the twin are rounded once, so logits of a few units differ in their last digits
SAME = 1e-4


def a_twin(tmp_path: Path, family: str, seed: int = 0, **overrides: Any) -> tuple[Path, Path, list[Any]]:
    """A tiny model's folder, its twin's folder, and what was changed."""
    original = save_tiny(tiny_model(family, **overrides), tmp_path / "original")
    (original / "tokenizer.json").write_text("{}")
    twin = tmp_path / f"twin{seed}"
    return original, twin, write_twin(original, twin, seed)


def logits(folder: Path) -> torch.Tensor:
    """The float32 logits of a folder on random tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(token_rows(2, 24))).logits


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_twin_computes_the_same_function(family: str, tmp_path: Path) -> None:
    original, twin, changed = a_twin(tmp_path, family)
    expected = logits(original)
    assert changed, "no fold was rescaled"
    assert float((logits(twin) - expected).abs().max() / expected.abs().max()) < SAME


def test_two_percent_of_the_channels_of_each_fold_get_a_factor_in_range(tmp_path: Path) -> None:
    _, _, changed = a_twin(tmp_path, "llama", hidden_size=128, intermediate_size=256)
    counts = {part.fold.rpartition(".")[2]: (part.channels, len(part.factors)) for part in changed if part.block == 1}
    assert counts == {
        "input_layernorm": (128, 3),
        "post_attention_layernorm": (128, 3),
        "v_proj": (64, 1),  # at least one
        "up_proj": (256, 5),
    }
    factors = [factor for part in changed for factor in part.factors.values()]
    assert SMALLEST <= min(factors) < max(factors) <= LARGEST


def test_the_file_holds_the_factors_on_producers_and_their_inverse_on_consumers(tmp_path: Path) -> None:
    original, twin, changed = a_twin(tmp_path, "llama")
    before, after = tensors(original), tensors(twin)
    (part,) = (part for part in changed if part.block == 0 and "post_attention" in part.fold)
    factor = torch.ones(64)
    for channel, value in part.factors.items():
        factor[channel] = value
    base = "model.layers.0"
    gain = after[f"{base}.post_attention_layernorm.weight"] / before[f"{base}.post_attention_layernorm.weight"].float()
    gate = after[f"{base}.mlp.gate_proj.weight"] / before[f"{base}.mlp.gate_proj.weight"].float()
    torch.testing.assert_close(gain, factor)
    torch.testing.assert_close(gate, (1.0 / factor).expand(96, 64))
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"].float())


def test_biases_of_producing_linears_are_rescaled_with_their_rows(tmp_path: Path) -> None:
    original, twin, changed = a_twin(tmp_path, "qwen2")
    (part,) = (part for part in changed if part.block == 0 and part.fold.endswith("v_proj"))
    name = "model.layers.0.self_attn.v_proj.bias"
    ratio = tensors(twin)[name] / tensors(original)[name].float()
    assert {channel for channel in range(len(ratio)) if abs(float(ratio[channel]) - 1) > 1e-3} == set(part.factors)


def test_a_twin_is_a_float32_folder_with_the_tokenizer(tmp_path: Path) -> None:
    _, twin, _ = a_twin(tmp_path, "llama-tied")
    config = json.loads((twin / "config.json").read_text())
    assert (config["dtype"], config.get("torch_dtype")) == ("float32", None)
    assert {value.dtype for value in tensors(twin).values()} == {torch.float32}
    assert (twin / "tokenizer.json").read_text() == "{}"


def test_a_seed_decides_the_twin(tmp_path: Path) -> None:
    original, first, changed = a_twin(tmp_path, "llama", seed=0)
    again = write_twin(original, tmp_path / "again", 0)
    other = write_twin(original, tmp_path / "other", 1)
    assert again == changed
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert [part.factors for part in other] != [part.factors for part in changed]


def row(model: str, method: str, seed: int, near: float, far: float) -> dict[str, Any]:
    return {"model": model, "method": method, "seed": seed, "kl_near": near, "kl_far": far}


ROWS = [
    row("original", "rtn", 0, 0.4, 0.5),
    row("original", "balanced", 0, 0.1, 0.2),
    row("twin", "rtn", 0, 0.8, 0.5),
    row("twin", "balanced", 0, 0.11, 0.2),
    row("original", "balanced", 1, 0.2, 0.2),
    row("twin", "rtn", 1, 1.6, 0.5),
    row("twin", "balanced", 1, 0.2, 0.3),
]


def test_quotients_are_per_seed_and_a_method_without_seeds_has_one_original() -> None:
    plain, balanced = compare(ROWS)
    assert (plain["method"], balanced["method"]) == ("rtn", "balanced")
    assert plain["twin_to_original_near_by_seed"] == pytest.approx([2.0, 4.0])
    assert plain["kl_near_twin_to_rtn"] == pytest.approx(3.0)
    assert balanced["twin_to_original_near"] == pytest.approx((1.1 + 1.0) / 2)
    assert balanced["kl_near_original_to_rtn"] == pytest.approx(0.15 / 0.4)


def test_the_table_says_whether_the_bound_is_kept() -> None:
    assert table_lines(compare(ROWS))[-1].endswith("bound 1.06: kept")
    worse = [*ROWS[:-1], row("twin", "balanced", 1, 0.3, 0.3)]
    assert table_lines(compare(worse))[-1].endswith("bound 1.06: not kept")
