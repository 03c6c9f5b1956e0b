"""Where a checkpoint's tensors lie in the model: renamed, stacked, cut; read back number by number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from awqkit.model.disk_places import joined, places_on_disk
from awqkit.model.skeleton import Skeleton
from awqkit.model.transformers_bridge import as_saved

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "gpt_neox": {},  # the head has another name on disk
    "mixtral": {"num_local_experts": 3},  # one tensor an expert and projection, under other names
    "qwen3_moe": {"num_experts": 3, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 16},
    "llama": {},
}


def saved(model_type: str, folder: Path) -> tuple[Any, dict[str, Tensor]]:
    config = AutoConfig.for_model(model_type, **SIZES, **MODELS[model_type])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    return model, load_file(folder / "model.safetensors")


class Disk:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


@pytest.mark.parametrize("model_type", MODELS)
def test_every_parameter_is_put_together_from_what_transformers_saved(model_type: str, tmp_path: Path) -> None:
    model, tensors = saved(model_type, tmp_path)
    places = places_on_disk(model, tensors)
    used: list[str] = []
    for name, value in model.named_parameters():
        used += places.disk_names(name)
        if name in places.whole:
            found = tensors[places.whole[name]]
        else:
            found = joined(places.slices[name], value.shape, tensors.__getitem__)
        assert torch.equal(found, value)
    assert sorted(used) == sorted(tensors)


def test_experts_are_slices_of_the_stack(tmp_path: Path) -> None:
    model, tensors = saved("mixtral", tmp_path)
    slices = places_on_disk(model, tensors).slices["model.layers.1.mlp.experts.gate_up_proj"]
    prefix = "model.layers.1.block_sparse_moe.experts"
    assert set(slices) == {f"{prefix}.{expert}.{part}.weight" for expert in range(3) for part in ("w1", "w3")}
    up = slices[f"{prefix}.2.w3.weight"]
    assert (up.shape, up.stride, up.offset) == ((48, 32), (32, 1), 2 * 96 * 32 + 48 * 32)


def test_a_stack_with_a_part_missing_is_missing(tmp_path: Path) -> None:
    model, tensors = saved("mixtral", tmp_path)
    lost = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    skeleton = Skeleton(model.config, Disk({name: value for name, value in tensors.items() if name != lost}))
    assert skeleton.missing() == ["model.layers.0.mlp.experts.down_proj"]


def test_a_value_is_cut_into_the_tensors_on_disk(tmp_path: Path) -> None:
    model, tensors = saved("qwen3_moe", tmp_path)
    skeleton = Skeleton(model.config, Disk(tensors))
    for name, value in model.named_parameters():
        for disk, part in skeleton.parts(name, value.data).items():
            assert torch.equal(part, tensors[disk])


def test_a_conversion_that_fails_leaves_the_plain_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import transformers.core_model_loading as loading

    def fails(*_: Any) -> None:
        raise RuntimeError("needs values")

    model, tensors = saved("gpt_neox", tmp_path)
    monkeypatch.setattr(loading, "revert_weight_conversion", fails)
    assert as_saved(model) == {}
    assert "lm_head.weight" not in places_on_disk(model, tensors).whole
