"""The AWQ layout holds a quantized weight exactly, and names what it cannot hold or read."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from awqkit.errors import CheckpointError, FormatError
from awqkit.formats.awq import AwqFormat
from awqkit.formats.format import FORMATS, format_for, stored_format
from awqkit.formats.scheme import Scheme, StoredConfig
from awqkit.numerics.grid import (
    Grid,
    QuantizedWeight,
    choose_scale_and_zero,
    dequantize,
    group_range,
    nearest_codes,
)
from awqkit.recipe import Recipe

AWQ = AwqFormat()
SCHEME = Scheme(4, 16, False)
G64 = Scheme(4, 64, False)


def quantize(weight: torch.Tensor, group_size: int, dtype: torch.dtype, symmetric: bool = False) -> QuantizedWeight:
    rows, columns = weight.shape
    low, high = group_range(weight.reshape(rows, columns // group_size, group_size))
    scale, zero = choose_scale_and_zero(low, high, bits=4, symmetric=symmetric, stored_dtype=dtype)
    grid = Grid(4, group_size, symmetric, scale, zero)
    return QuantizedWeight(nearest_codes(weight, grid), grid)


def random_weight(rows: int = 24, columns: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


class TestPack:
    @settings(max_examples=30, deadline=None)
    @given(
        rows=st.integers(1, 4),
        groups=st.integers(1, 4),
        exponent=st.integers(-12, 6),
        dtype=st.sampled_from([torch.bfloat16, torch.float16]),
        symmetric=st.booleans(),
        seed=st.integers(0, 1000),
    )
    def test_unpack_gives_the_same_weight_bit_for_bit(
        self, rows: int, groups: int, exponent: int, dtype: torch.dtype, symmetric: bool, seed: int
    ) -> None:
        weight = random_weight(8 * rows, 16 * groups, seed) * 2.0**exponent
        quantized = quantize(weight, 16, dtype, symmetric)
        tensors = AWQ.pack("m", quantized, Scheme(4, 16, symmetric), dtype)
        assert torch.equal(tensors["m.scales"].float().t(), quantized.grid.group_scale)
        back = AWQ.unpack("m", tensors, SCHEME)
        assert torch.equal(back.codes, quantized.codes)
        assert torch.equal(dequantize(back.codes, back.grid), dequantize(quantized.codes, quantized.grid))
        assert back.grid.symmetric or not symmetric

    def test_tensors_are_as_the_specs_say(self) -> None:
        specs = AWQ.tensor_specs("a.b", 24, 32, SCHEME, torch.bfloat16)
        tensors = AWQ.pack("a.b", quantize(random_weight(), 16, torch.bfloat16), SCHEME, torch.bfloat16)
        assert specs == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        assert tuple(specs) == AWQ.tensor_names("a.b", SCHEME)
        assert specs["a.b.qweight"] == (torch.int32, (32, 3))
        assert specs["a.b.qzeros"] == (torch.int32, (2, 3))
        assert specs["a.b.scales"] == (torch.bfloat16, (2, 24))
        assert all(tensor.is_contiguous() for tensor in tensors.values())

    def test_golden_tensors(self) -> None:
        codes = torch.arange(1, 9, dtype=torch.uint8)[:, None].expand(8, 16).contiguous()
        scale = torch.arange(1, 9, dtype=torch.float32)[:, None] / 8
        zero = torch.arange(8, dtype=torch.float32)[:, None]
        tensors = AWQ.pack("m", QuantizedWeight(codes, Grid(4, 16, False, scale, zero)), SCHEME, torch.float16)
        assert (tensors["m.qweight"] == -2042464975).all()
        assert tensors["m.qzeros"].tolist() == [[0x75316420]]
        assert tensors["m.scales"].tolist() == [[n / 8 for n in range(1, 9)]]

    def test_symmetric_zero_points_are_written(self) -> None:
        quantized = quantize(random_weight(), 16, torch.float16, symmetric=True)
        tensors = AWQ.pack("m", quantized, Scheme(4, 16, True), torch.float16)
        assert (tensors["m.qzeros"] == 0x88888888 - (1 << 32)).all()

    def test_a_scale_that_the_dtype_cannot_hold_is_refused(self) -> None:
        quantized = quantize(random_weight(), 16, torch.float16)
        with pytest.raises(ValueError, match=r"not exact in torch\.bfloat16"):
            AWQ.pack("m", quantized, SCHEME, torch.bfloat16)

    @pytest.mark.parametrize("zero", [-1.0, 2.5, 16.0])
    def test_a_zero_point_that_is_no_code_is_refused(self, zero: float) -> None:
        grid = Grid(4, 16, False, torch.ones(8, 1), torch.full((8, 1), zero))
        with pytest.raises(ValueError, match=r"zero point|a code is 16"):
            AWQ.pack("m", QuantizedWeight(torch.zeros(8, 16, dtype=torch.uint8), grid), SCHEME, torch.bfloat16)

    def test_other_grids_are_refused(self) -> None:
        codes = torch.zeros(8, 16, dtype=torch.uint8)
        for bits, group_size in [(3, 16), (4, 8)]:
            grid = Grid(bits, group_size, False, torch.ones(8, 1), torch.zeros(8, 1))
            with pytest.raises(ValueError, match="does not fit 4 bits and groups of 16"):
                AWQ.pack("m", QuantizedWeight(codes, grid), SCHEME, torch.bfloat16)


class TestUnpack:
    @pytest.fixture
    def tensors(self) -> dict[str, torch.Tensor]:
        return AWQ.pack("m", quantize(random_weight(), 16, torch.bfloat16), SCHEME, torch.bfloat16)

    def test_one_group_per_row(self) -> None:
        quantized = quantize(random_weight(), 32, torch.float16)
        back = AWQ.unpack("m", AWQ.pack("m", quantized, Scheme(4, 32, False), torch.float16), Scheme(4, -1, False))
        assert back.grid.group_size == 32
        assert torch.equal(back.codes, quantized.codes)

    @pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
    def test_a_missing_tensor(self, tensors: dict[str, torch.Tensor], part: str) -> None:
        del tensors[f"m.{part}"]
        with pytest.raises(CheckpointError, match=f"m: the checkpoint lacks m.{part}"):
            AWQ.unpack("m", tensors, SCHEME)

    @pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
    def test_a_misshapen_tensor(self, tensors: dict[str, torch.Tensor], part: str) -> None:
        for wrong in (tensors[f"m.{part}"][1:], tensors[f"m.{part}"][0]):
            with pytest.raises(CheckpointError, match="do not fit together with groups of 16"):
                AWQ.unpack("m", {**tensors, f"m.{part}": wrong}, SCHEME)

    def test_another_group_size_than_the_config_says(self, tensors: dict[str, torch.Tensor]) -> None:
        with pytest.raises(CheckpointError, match="groups of 32"):
            AWQ.unpack("m", tensors, Scheme(4, 32, False))

    @pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
    def test_another_dtype(self, tensors: dict[str, torch.Tensor], part: str) -> None:
        with pytest.raises(CheckpointError, match="expected int32, int32 and a floating-point dtype"):
            AWQ.unpack("m", {**tensors, f"m.{part}": tensors[f"m.{part}"].to(torch.int64)}, SCHEME)

    def test_linears_are_found_by_their_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        names = ["x.weight", *tensors, "a.b.qweight", "a.b.qzeros", "a.b.scales", "a.b.bias"]
        assert AWQ.quantized_linears(names, SCHEME) == ["m", "a.b"]


class TestWhatCanBeHeld:
    def test_the_defaults(self) -> None:
        assert format_for(Recipe()) is FORMATS["awq"]
        for group_size in (16, 32, 64, 128):
            assert format_for(Recipe(group_size=group_size)) is FORMATS["awq"]

    @pytest.mark.parametrize("bits", [2, 3, 8])
    def test_bits_name_the_format_that_holds_them(self, bits: int) -> None:
        line = f"bits is {bits}; the awq format holds 4 bits only, use --format compressed-tensors"
        with pytest.raises(FormatError, match=f"^{line}$"):
            format_for(Recipe(bits=bits))

    def test_bits_that_no_format_holds(self) -> None:
        with pytest.raises(FormatError, match=r"^bits is 5; the awq format holds 4 bits only$"):
            format_for(Recipe(bits=5))

    @pytest.mark.parametrize(("group_size", "advice"), [(48, ""), (256, ", use --format c"), (-1, ", use --format c")])
    def test_group_sizes(self, group_size: int, advice: str) -> None:
        with pytest.raises(FormatError, match=rf"group_size is {group_size}.*128, 64, 32 and 16{advice}"):
            format_for(Recipe(group_size=group_size))

    def test_activations(self) -> None:
        w8a8 = Recipe(format="awq", bits=8, group_size=-1, symmetric=True, activations="int8")
        with pytest.raises(FormatError, match="activations is int8; the awq format holds weights only, use --format c"):
            format_for(w8a8)

    def test_shapes(self) -> None:
        assert AWQ.why_not_held(8, 256, 128) is None
        assert AWQ.why_not_held(12, 256, 128) == "its 12 outputs are not a multiple of 8, the codes of one word"
        assert AWQ.why_not_held(8, 576, 128) == "groups of 128 do not divide its 576 inputs (64, 32 and 16 would)"
        assert AWQ.why_not_held(8, 48, 32) == "groups of 32 do not divide its 48 inputs (16 would)"
        assert "nor does any size" in str(AWQ.why_not_held(8, 100, 128))

    def test_specs_of_what_cannot_be_held(self) -> None:
        with pytest.raises(FormatError, match=r"a\.b: its 12 outputs"):
            AWQ.tensor_specs("a.b", 12, 128, Scheme(4, 128, False), torch.bfloat16)
        with pytest.raises(FormatError, match=r"a\.b: scales in torch\.float32"):
            AWQ.tensor_specs("a.b", 8, 128, Scheme(4, 128, False), torch.float32)

    def test_cautions(self) -> None:
        linears = {"m.q_proj": (1024, 1024)}
        assert AWQ.cautions(linears, Scheme(4, 128, False)) == []
        assert "groups of 16" in AWQ.cautions(linears, SCHEME)[0]


def layer(index: int) -> list[str]:
    attention = [f"model.layers.{index}.self_attn.{part}_proj" for part in "qkvo"]
    return attention + [f"model.layers.{index}.mlp.{part}_proj" for part in ("gate", "up", "down")]


class TestQuantizationConfig:
    def test_the_block_as_readers_want_it(self) -> None:
        config = AWQ.quantization_config(Scheme(4, 128, False), [], layer(0))
        assert config == {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": 128,
            "zero_point": True,
            "modules_to_not_convert": ["lm_head"],
        }
        assert json.loads(json.dumps(config)) == config

    def test_whole_fused_units_are_listed_by_their_fused_name_too(self) -> None:
        kept = ["lm_head", *layer(1)]
        listed = AWQ.quantization_config(G64, kept, [*layer(0), *layer(1), "lm_head"])["modules_to_not_convert"]
        fused = ["model.layers.1.mlp.gate_up_proj", "model.layers.1.self_attn.qkv_proj"]
        assert sorted(listed) == sorted([*kept, *fused])
        assert len(listed) == len(set(listed))

    def test_the_list_does_not_depend_on_the_order_of_the_kept(self) -> None:
        linears = layer(0) + layer(1)
        one = AWQ.quantization_config(G64, layer(1), linears)
        assert AWQ.quantization_config(G64, layer(1)[::-1], linears) == one

    def test_kept_paths_outside_of_the_linears_are_listed(self) -> None:
        config = AWQ.quantization_config(G64, ["visual.blocks.0.attn.qkv"], layer(0))
        assert config["modules_to_not_convert"] == ["visual.blocks.0.attn.qkv", "lm_head"]

    def test_layer_1_does_not_cover_layer_10(self) -> None:
        AWQ.quantization_config(G64, layer(1), layer(1) + layer(10))

    def test_a_split_fused_unit_is_refused(self) -> None:
        with pytest.raises(FormatError, match=r"0\.self_attn\.k_proj is kept and .*q_proj quantized.*qkv_proj"):
            AWQ.quantization_config(G64, ["model.layers.0.self_attn.k_proj"], layer(0))

    def test_a_kept_path_inside_a_quantized_one_is_refused(self) -> None:
        with pytest.raises(FormatError, match=r"mlp\.gate is kept and model\.layers\.0\.mlp\.gate_proj quantized"):
            AWQ.quantization_config(G64, ["model.layers.0.mlp.gate"], layer(0))

    def test_a_quantized_head_is_refused(self) -> None:
        with pytest.raises(FormatError, match="lm_head is kept and lm_head quantized"):
            AWQ.quantization_config(G64, [], [*layer(0), "lm_head"])

    def test_a_router_may_be_kept_beside_quantized_experts(self) -> None:
        mlp = "model.layers.0.mlp"
        experts = [f"{mlp}.experts.{e}.{part}_proj" for e in range(2) for part in ("gate", "up", "down")]
        config = AWQ.quantization_config(G64, [f"{mlp}.gate"], [*experts, f"{mlp}.gate"])
        assert config["modules_to_not_convert"] == [f"{mlp}.gate", "lm_head"]
        with pytest.raises(FormatError, match=r"one model\.layers\.0\.mlp\.experts"):
            AWQ.quantization_config(G64, experts[:3], experts)


class TestReadConfig:
    def test_its_own(self) -> None:
        config = AWQ.read_config(AWQ.quantization_config(G64, [], layer(0)))
        assert config == StoredConfig(G64, ("lm_head",))

    def test_older_spellings(self) -> None:
        config = {
            "quant_method": "awq",
            "w_bit": 4,
            "q_group_size": 32,
            "version": "GEMM",
            "zero_point": True,
        }
        assert AWQ.read_config(config) == StoredConfig(Scheme(4, 32, False), ())
        assert AWQ.read_config({**config, "modules_to_not_convert": None}) == StoredConfig(Scheme(4, 32, False), ())
        assert AWQ.read_config({"quant_method": "awq", "bits": 4, "group_size": -1}).scheme.group_size == -1

    @pytest.mark.parametrize("version", ["gemv", "gemv_fast", "llm-awq", "marlin", 1])
    def test_other_versions(self, version: object) -> None:
        with pytest.raises(CheckpointError, match="only 'gemm' can be read"):
            AWQ.read_config({"version": version, "bits": 4, "group_size": 128})

    @pytest.mark.parametrize("bits", [8, "4", None])
    def test_other_bits(self, bits: object) -> None:
        with pytest.raises(CheckpointError, match="bits; awq checkpoints hold 4"):
            AWQ.read_config({"bits": bits, "group_size": 128})

    @pytest.mark.parametrize("group_size", [0, -2, "128", 64.0, True])
    def test_other_group_sizes(self, group_size: object) -> None:
        with pytest.raises(CheckpointError, match="expected a positive number or -1"):
            AWQ.read_config({"bits": 4, "group_size": group_size})


class TestStoredFormat:
    BLOCK = AWQ.quantization_config(G64, [], [])

    def test_the_table_is_by_name(self) -> None:
        assert all(name == entry.name for name, entry in FORMATS.items())

    def test_full_precision(self) -> None:
        assert stored_format({"architectures": ["X"], "quantization_config": None}) is None

    @pytest.mark.parametrize(
        "config",
        [
            {"quantization_config": BLOCK},
            {"text_config": {"quantization_config": BLOCK}},
            {"compression_config": BLOCK},
        ],
    )
    def test_it_is_found_where_vllm_finds_it(self, config: dict) -> None:
        found = stored_format(config)
        assert found is not None
        assert found[0] is FORMATS["awq"]
        assert found[1].scheme.group_size == 64

    @pytest.mark.parametrize("block", [{"quant_method": "gptq"}, {"bits": 4}, "awq"])
    def test_another_method(self, block: object) -> None:
        with pytest.raises(CheckpointError, match="only awq, compressed-tensors can be read"):
            stored_format({"quantization_config": block})
