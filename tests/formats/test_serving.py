"""Which linears servers fuse, and which tensor-parallel sizes would not load."""

from __future__ import annotations

import pytest

from awqkit.formats.serving import fused_partners, fused_units, tensor_parallel_cautions


def cautions(linears: dict[str, tuple[int, int]], group_size: int = 128) -> list[str]:
    return tensor_parallel_cautions(linears, group_size, word_columns=8)


def test_attention_and_mlp_of_every_block() -> None:
    parts = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    )
    partners = fused_partners([f"model.layers.{i}.{part}" for i in range(2) for part in parts])
    assert len(partners) == 4
    assert partners[0] == tuple(f"model.layers.0.self_attn.{x}_proj" for x in "qkv")
    assert partners[3] == ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")


@pytest.mark.parametrize(
    ("linears", "path"),
    [
        (["a.q_proj", "a.k_proj"], "a.qkv_proj"),
        (["a.w1", "a.w3"], "a.gate_up_proj"),
        (["q_proj", "k_proj", "v_proj"], "qkv_proj"),
        (["a.experts.0.w1", "a.experts.0.w2", "a.experts.0.w3", "a.experts.11.w1"], "a.experts"),
        (["a.experts.0.gate_proj", "a.experts.1.up_proj"], "a.experts"),
    ],
)
def test_parts_of_one_unit(linears: list[str], path: str) -> None:
    (unit,) = fused_units(linears)
    assert unit.path == path
    assert unit.parts == tuple(linears)


def test_what_is_not_fused() -> None:
    assert (
        fused_partners(["a.q_proj", "b.k_proj", "a.o_proj", "a.down_proj", "a.qkv_proj", "a.xq_proj", "lm_head"]) == []
    )
    assert fused_partners(["a.shared_experts.gate_proj", "a.experts.0.gate_proj"]) == []


def test_sizes_that_load_give_no_caution() -> None:
    assert cautions({"m.q_proj": (4096, 4096), "m.k_proj": (1024, 4096), "m.o_proj": (4096, 4096)}) == []


def test_row_parallel_linears_need_whole_groups_on_each_rank() -> None:
    lines = cautions({"m.q_proj": (576, 576), "m.o_proj": (576, 576), "m.down_proj": (576, 1536)}, group_size=64)
    assert [line.split(" would")[0] for line in lines] == [f"tensor parallelism of {t}" for t in (2, 4, 8)]
    assert all("m.o_proj has 576 inputs" in line and "2 parts of whole 64s" in line for line in lines[:1])


def test_column_parallel_linears_need_whole_words_on_each_rank() -> None:
    lines = cautions({"m.k_proj": (32, 4096), "m.o_proj": (4096, 4096)})
    assert lines == [
        "tensor parallelism of 8 would not load this checkpoint: "
        "m.k_proj has 32 outputs, which do not split into 8 parts of whole 8s"
    ]


def test_only_the_sizes_at_fault_are_named() -> None:
    lines = cautions({"m.down_proj": (4096, 14336)}, group_size=128)  # 14336 = 112 · 128
    assert lines == []
    assert [line.split()[3] for line in cautions({"m.down_proj": (4096, 11008)}, group_size=128)] == [
        "4",
        "8",
    ]  # 86 · 128
