"""The compressed-tensors layouts hold a weight exactly, as the library reads them, and name what they cannot."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from awqkit.errors import CheckpointError, FormatError
from awqkit.formats.compressed_tensors import CompressedTensorsFormat
from awqkit.formats.format import FORMATS, format_for, stored_format
from awqkit.formats.scheme import Scheme, StoredConfig
from awqkit.numerics.grid import Grid, QuantizedWeight, dequantize
from awqkit.numerics.rounding import round_nearest, span_grid
from awqkit.recipe import Recipe

CT = CompressedTensorsFormat()
W8A8 = Scheme(8, -1, True, "int8")
G16 = Scheme(4, 16, False)
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
SCHEMES = [
    Scheme(bits, size, symmetric) for bits in (2, 3, 4, 8) for size in (16, 32, 256, -1) for symmetric in (False, True)
]


def quantized(scheme: Scheme, rows: int = 24, columns: int = 256, dtype: Any = torch.bfloat16) -> QuantizedWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    weight[0] = weight[0].abs() + 1  # a row far from zero
    grid = span_grid(
        weight, bits=scheme.bits, group_size=scheme.columns(columns), symmetric=scheme.symmetric, stored_dtype=dtype
    )
    return round_nearest(weight, grid)


def library_value(tensors: dict[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The weight of module `m` by the library's own compressor, its scales in float32."""
    pytest.importorskip("compressed_tensors", minversion="0.18")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    layout = CT.quantization_config(scheme, [], [])["format"]
    group = CT.quantization_config(scheme, [], [])["config_groups"]["group_0"]
    local = {name.removeprefix("m."): tensor for name, tensor in tensors.items()}
    local["weight_scale"] = local["weight_scale"].float()
    found = BaseCompressor.get_value_from_registry(layout).decompress(local, QuantizationScheme(**group))
    return found["weight"].float()


class TestPack:
    @pytest.mark.parametrize("scheme", SCHEMES, ids=str)
    def test_the_library_reads_exactly_our_weight(self, scheme: Scheme) -> None:
        weight = quantized(scheme)
        tensors = CT.pack("m", weight, scheme, torch.bfloat16)
        assert torch.equal(library_value(tensors, scheme), dequantize(weight.codes, weight.grid))

    def test_the_library_reads_exactly_our_w8a8_weight(self) -> None:
        weight = quantized(W8A8)
        tensors = CT.pack("m", weight, W8A8, torch.bfloat16)
        assert torch.equal(library_value(tensors, W8A8), dequantize(weight.codes, weight.grid))

    @settings(max_examples=40, deadline=None)
    @given(
        rows=st.integers(1, 40),
        groups=st.integers(1, 4),
        bits=st.integers(2, 8),
        dtype=st.sampled_from([torch.bfloat16, torch.float16]),
        symmetric=st.booleans(),
    )
    def test_unpack_gives_the_same_weight_bit_for_bit(
        self, rows: int, groups: int, bits: int, dtype: torch.dtype, symmetric: bool
    ) -> None:
        scheme = Scheme(bits, 16, symmetric)
        weight = quantized(scheme, rows, 16 * groups, dtype)
        tensors = CT.pack("m", weight, scheme, dtype)
        back = CT.unpack("m", tensors, scheme)
        for found, expected in (
            (back.codes, weight.codes),
            (back.grid.group_scale, weight.grid.group_scale),
            (back.grid.group_zero, weight.grid.group_zero),
        ):
            assert torch.equal(found, expected) and found.dtype == expected.dtype
        assert (back.grid.bits, back.grid.group_size, back.grid.symmetric) == (bits, 16, symmetric)

    @pytest.mark.parametrize("scheme", [*SCHEMES, W8A8], ids=str)
    def test_tensors_are_as_the_specs_say(self, scheme: Scheme) -> None:
        tensors = CT.pack("a.b", quantized(scheme), scheme, torch.bfloat16)
        specs = CT.tensor_specs("a.b", 24, 256, scheme, torch.bfloat16)
        assert specs == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        assert tuple(specs) == CT.tensor_names("a.b", scheme)
        assert all(tensor.is_contiguous() for tensor in tensors.values())
        assert CT.quantized_linears(tensors, scheme) == ["a.b"]
        assert CT.linear_shape("a.b", tensors.__getitem__, scheme) == (24, 256)

    def test_golden_tensors(self) -> None:
        codes = torch.arange(1, 17, dtype=torch.uint8).remainder(16).expand(8, 16).contiguous()
        scale = torch.arange(1, 9, dtype=torch.float32)[:, None] / 8
        zero = torch.arange(8, dtype=torch.float32)[:, None]
        tensors = CT.pack("m", QuantizedWeight(codes, Grid(4, 16, False, scale, zero)), G16, torch.float16)
        assert tensors["m.weight_packed"].tolist() == [[0x87654321 - (1 << 32), 0x0FEDCBA9]] * 8
        assert tensors["m.weight_zero_point"].tolist() == [[0x76543210]]  # along N, the codes along K
        assert tensors["m.weight_scale"].tolist() == [[n / 8] for n in range(1, 9)]
        assert tensors["m.weight_shape"].tolist() == [8, 16] and tensors["m.weight_shape"].dtype == torch.int64

    def test_golden_w8a8_tensors(self) -> None:
        codes = torch.tensor([[0, 1, 127, 128, 129, 255]], dtype=torch.uint8)
        grid = Grid(8, 6, True, torch.ones(1, 1), torch.full((1, 1), 128.0))
        tensors = CT.pack("m", QuantizedWeight(codes, grid), W8A8, torch.bfloat16)
        assert set(tensors) == {"m.weight", "m.weight_scale"}
        assert tensors["m.weight"].dtype == torch.int8
        assert tensors["m.weight"].tolist() == [[-128, -127, -1, 0, 1, 127]]

    def test_symmetric_zero_points_are_not_written(self) -> None:
        scheme = Scheme(4, 16, True)
        assert [name for name in CT.pack("m", quantized(scheme), scheme, torch.float16) if "zero" in name] == []
        with pytest.raises(ValueError, match="a zero point is not 8, and a symmetric scheme stores none"):
            CT.pack("m", quantized(G16), scheme, torch.bfloat16)

    def test_a_scale_that_the_dtype_cannot_hold_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"not exact in torch\.bfloat16"):
            CT.pack("m", quantized(G16, dtype=torch.float16), G16, torch.bfloat16)

    def test_another_grid_is_refused(self) -> None:
        with pytest.raises(ValueError, match="a grid of 4 bits and groups of 16 does not fit 4 bits and one group a"):
            CT.pack("m", quantized(G16), Scheme(4, -1, False), torch.bfloat16)


class TestUnpack:
    @pytest.fixture
    def tensors(self) -> dict[str, torch.Tensor]:
        return CT.pack("m", quantized(G16, 24, 32), G16, torch.bfloat16)

    @pytest.mark.parametrize("part", PARTS)
    def test_a_missing_tensor(self, tensors: dict[str, torch.Tensor], part: str) -> None:
        del tensors[f"m.{part}"]
        with pytest.raises(CheckpointError, match=f"m: the checkpoint lacks m.{part}"):
            CT.unpack("m", tensors, G16)

    @pytest.mark.parametrize("part", PARTS)
    def test_a_misshapen_tensor(self, tensors: dict[str, torch.Tensor], part: str) -> None:
        for wrong in (tensors[f"m.{part}"][1:], tensors[f"m.{part}"].unsqueeze(0)):
            with pytest.raises(CheckpointError, match=r"do not fit|does not fit|expected two integers"):
                CT.unpack("m", {**tensors, f"m.{part}": wrong}, G16)

    def test_another_dtype(self, tensors: dict[str, torch.Tensor]) -> None:
        for part in ("weight_packed", "weight_zero_point"):
            with pytest.raises(CheckpointError, match=r"m: .*int64"):
                CT.unpack("m", {**tensors, f"m.{part}": tensors[f"m.{part}"].to(torch.int64)}, G16)
        with pytest.raises(CheckpointError, match="expected a floating-point dtype"):
            CT.unpack("m", {**tensors, "m.weight_scale": tensors["m.weight_scale"].to(torch.int32)}, G16)

    def test_another_group_size_than_the_config_says(self, tensors: dict[str, torch.Tensor]) -> None:
        with pytest.raises(CheckpointError, match="do not fit a weight of 24 x 32 with 4 bits and groups of 32"):
            CT.unpack("m", tensors, Scheme(4, 32, False))

    def test_w8a8_that_does_not_fit(self) -> None:
        tensors = CT.pack("m", quantized(W8A8), W8A8, torch.bfloat16)
        for wrong in (
            {"m.weight": tensors["m.weight"].to(torch.int16)},
            {"m.weight_scale": tensors["m.weight_scale"][:, 0]},
        ):
            with pytest.raises(CheckpointError, match=r"expected int8 \[N, K\] and a floating-point \[N, 1\]"):
                CT.unpack("m", {**tensors, **wrong}, W8A8)

    @pytest.mark.parametrize("bits", [3, 5, 6, 7])
    @pytest.mark.parametrize("symmetric", [False, True])
    def test_the_padded_layout_of_older_versions_is_told_by_its_width(self, bits: int, symmetric: bool) -> None:
        scheme = Scheme(bits, 32, symmetric)
        weight = quantized(scheme, 64, 96)
        tensors = CT.pack("m", weight, scheme, torch.bfloat16)
        tensors["m.weight_packed"] = padded(weight.codes, bits)
        if not symmetric:
            tensors["m.weight_zero_point"] = padded(weight.grid.group_zero.to(torch.uint8).t(), bits).t()
        back = CT.unpack("m", tensors, scheme)
        assert torch.equal(back.codes, weight.codes)
        assert torch.equal(back.grid.group_zero, weight.grid.group_zero)


def padded(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Words of 32 // bits codes each, as compressed-tensors up to 0.17 wrote them."""
    per_word = 32 // bits
    filled = torch.nn.functional.pad(codes.to(torch.int64), (0, -codes.shape[1] % per_word))
    shifts = torch.arange(per_word) * bits
    return (filled.reshape(codes.shape[0], -1, per_word) << shifts).sum(dim=-1).to(torch.int32)


class TestWhatCanBeHeld:
    def test_recipes(self) -> None:
        for scheme in [*SCHEMES, W8A8]:
            recipe = Recipe(
                format="compressed-tensors",
                bits=scheme.bits,
                group_size=scheme.group_size,
                symmetric=scheme.symmetric,
                activations=scheme.activations,
            )
            assert format_for(recipe) is FORMATS["compressed-tensors"]
        assert format_for(Recipe(format="compressed-tensors", bits=3)) is FORMATS["compressed-tensors"]

    @pytest.mark.parametrize(
        ("choices", "line"),
        [
            ({"bits": 5}, "bits is 5; the compressed-tensors format is written with 2, 3, 4 and 8 bits"),
            ({"group_size": 48}, "group_size is 48; .* 256, 128, 64, 32, 16 and channel"),
            ({"activations": "int8"}, "int8 with 4 bits, groups of 128 and an asymmetric grid; it takes --bits 8"),
        ],
    )
    def test_what_is_refused(self, choices: dict, line: str) -> None:
        with pytest.raises(FormatError, match=line):
            format_for(Recipe(format="compressed-tensors", **choices))

    def test_shapes(self) -> None:
        assert CT.why_not_held(12, 256, 128) is None
        assert CT.why_not_held(1, 100, -1) is None
        assert CT.why_not_held(8, 48, 32) == "groups of 32 do not divide its 48 inputs (16 and channel would)"
        assert CT.why_not_held(8, 100, 32) == "groups of 32 do not divide its 100 inputs (channel would)"
        with pytest.raises(FormatError, match=r"a\.b: groups of 32"):
            CT.tensor_specs("a.b", 12, 48, Scheme(4, 32, True), torch.bfloat16)
        with pytest.raises(FormatError, match=r"a\.b: scales in torch\.float32"):
            CT.tensor_specs("a.b", 12, 64, Scheme(4, 32, True), torch.float32)

    @pytest.mark.parametrize(
        ("scheme", "words"),
        [
            (Scheme(4, 128, True), []),
            (Scheme(4, -1, True), []),
            (W8A8, []),
            (Scheme(4, 128, False), ["dequantize=True"]),
            (Scheme(3, 128, True), ["vLLM takes 3 bits .* before 0.18"]),
            (Scheme(2, 64, True), ["vLLM takes 2 bits"]),
            (Scheme(8, 128, True), ["not on a CPU$"]),
            (Scheme(8, 128, False), ["dequantize=True", "capability 9.0"]),
            (Scheme(4, 256, True), ["groups of 256"]),
            (Scheme(4, 16, True), ["groups of 16"]),
        ],
        ids=str,
    )
    def test_cautions_name_the_readers_that_cannot(self, scheme: Scheme, words: list[str]) -> None:
        import re

        lines = CT.cautions({"m.q_proj": (4096, 4096), "m.o_proj": (4096, 4096)}, scheme)
        assert len(lines) == len(words)
        assert all(re.search(word, line) for word, line in zip(words, lines, strict=True))

    def test_cautions_about_tensor_parallelism(self) -> None:
        linears = {"m.o_proj": (96, 96), "m.q_proj": (96, 96)}
        lines = CT.cautions(linears, Scheme(4, 32, True))
        assert lines[0].startswith("tensor parallelism of 2 would not load this checkpoint: m.o_proj has 96 inputs")
        assert CT.cautions({"m.o_proj": (96, 128)}, Scheme(4, -1, True)) == []
        assert "m.q_proj has 96 outputs" in CT.cautions({"m.q_proj": (96, 96)}, Scheme(3, 32, False))[-1]


def layer(index: int) -> list[str]:
    attention = [f"model.layers.{index}.self_attn.{part}_proj" for part in "qkvo"]
    return attention + [f"model.layers.{index}.mlp.{part}_proj" for part in ("gate", "up", "down")]


class TestQuantizationConfig:
    def test_the_block_as_readers_want_it(self) -> None:
        block = CT.quantization_config(Scheme(4, 128, True), [], layer(0))
        weights = {
            "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False,
        }  # fmt: skip
        assert block == {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "format": "pack-quantized", "weights": weights}},
        }
        assert json.loads(json.dumps(block)) == block

    def test_one_group_a_row(self) -> None:
        (group,) = CT.quantization_config(Scheme(3, -1, False), [], [])["config_groups"].values()
        assert group["weights"] == {
            "num_bits": 3, "type": "int", "symmetric": False, "strategy": "channel", "dynamic": False,
        }  # fmt: skip

    def test_w8a8(self) -> None:
        block = CT.quantization_config(W8A8, [], [])
        (group,) = block["config_groups"].values()
        assert block["format"] == group["format"] == "int-quantized"
        assert group["weights"] == {
            "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False,
        }  # fmt: skip
        assert group["input_activations"] == {
            "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
        }  # fmt: skip

    def test_the_library_takes_every_block(self) -> None:
        quantization = pytest.importorskip("compressed_tensors.quantization")
        for scheme in [*SCHEMES, W8A8]:
            quantization.QuantizationConfig.model_validate(
                CT.quantization_config(scheme, layer(1), layer(0) + layer(1))
            )

    def test_kept_linears_are_listed_by_their_full_paths(self) -> None:
        block = CT.quantization_config(G16, ["lm_head", *layer(1)[::-1]], [*layer(0), *layer(1), "lm_head"])
        assert block["ignore"] == [*sorted(layer(1)), "lm_head"]

    def test_a_router_may_be_kept_beside_quantized_projections(self) -> None:
        kept = ["model.layers.0.mlp.gate"]
        assert CT.quantization_config(G16, kept, [*layer(0), *kept])["ignore"] == [*kept, "lm_head"]

    def test_a_split_fused_unit_is_refused(self) -> None:
        with pytest.raises(FormatError, match=r"0\.self_attn\.k_proj is kept and .*q_proj quantized.*qkv_proj"):
            CT.quantization_config(G16, ["model.layers.0.self_attn.k_proj"], layer(0))

    def test_a_quantized_head_is_refused(self) -> None:
        with pytest.raises(FormatError, match="lm_head is quantized"):
            CT.quantization_config(G16, [], [*layer(0), "lm_head"])


def changed(block: dict, *path: str, to: Any) -> dict:
    """A copy of a block with one value replaced."""
    copy = json.loads(json.dumps(block))
    place = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return copy


GROUP = ("config_groups", "group_0")


class TestReadConfig:
    @pytest.mark.parametrize("scheme", [*SCHEMES, W8A8], ids=str)
    def test_its_own(self, scheme: Scheme) -> None:
        block = CT.quantization_config(scheme, layer(1), layer(0) + layer(1))
        assert CT.read_config(block) == StoredConfig(scheme, (*sorted(layer(1)), "lm_head"))
        found = stored_format({"quantization_config": block})
        assert found is not None and found[0] is FORMATS["compressed-tensors"]

    def test_what_llm_compressor_writes(self) -> None:
        block = CT.quantization_config(Scheme(4, 128, True), [], [])
        weights = {
            "actorder": "static", "block_structure": None, "dynamic": False, "group_size": 128, "num_bits": 4,
            "observer": "minmax", "observer_kwargs": {}, "scale_dtype": None, "strategy": "group", "symmetric": True,
            "type": "int", "zp_dtype": None,
        }  # fmt: skip
        group = {"format": None, "input_activations": None, "output_activations": None, "targets": ["Linear"]}
        theirs = {
            **block,
            "config_groups": {"group_0": {**group, "weights": weights}},
            "kv_cache_scheme": None, "global_compression_ratio": 1.6, "sparsity_config": {}, "transform_config": {},
            "version": "0.12.3",
        }  # fmt: skip
        assert CT.read_config(theirs).scheme == Scheme(4, 128, True)

    @pytest.mark.parametrize(
        ("path", "value", "line"),
        [
            (("config_groups",), {}, "0 config_groups"),
            (("config_groups",), {"a": {}, "b": {}}, "2 config_groups"),
            (("quantization_status",), "frozen", "quantization_status 'frozen'; only 'compressed'"),
            (("kv_cache_scheme",), {"num_bits": 8}, "kv_cache_scheme"),
            (("sparsity_config",), {"format": "sparse-24-bitmask"}, "sparsity_config"),
            (("transform_config",), {"config_groups": {"u": {}}}, "transform_config"),
            ((*GROUP, "format"), "nvfp4-pack-quantized", "format 'nvfp4-pack-quantized'; only 'pack-quantized' and"),
            ((*GROUP, "weights", "num_bits"), 1, "num_bits 1"),
            ((*GROUP, "weights", "num_bits"), True, "num_bits True"),
            ((*GROUP, "weights", "type"), "float", "type 'float'; only 'int'"),
            ((*GROUP, "weights", "strategy"), "tensor", "strategy 'tensor'; only 'group' and 'channel'"),
            ((*GROUP, "weights", "actorder"), "group", "actorder 'group'"),
            ((*GROUP, "weights", "group_size"), 0, "group_size 0; expected a positive number"),
            ((*GROUP, "weights", "dynamic"), True, "dynamic True"),
            ((*GROUP, "input_activations"), {"num_bits": 8}, "input_activations"),
            ((*GROUP, "output_activations"), {"num_bits": 8}, "output_activations"),
        ],
        ids=lambda value: str(value)[:20],
    )
    def test_what_would_be_misread_is_refused(self, path: tuple[str, ...], value: Any, line: str) -> None:
        block = CT.quantization_config(Scheme(4, 128, True), [], [])
        with pytest.raises(CheckpointError, match=f"quantization_config has .*{line}"):
            CT.read_config(changed(block, *path, to=value))

    @pytest.mark.parametrize(
        ("path", "value", "line"),
        [
            (("input_activations",), None, "input_activations.num_bits of int-quantized None; only 8"),
            (("input_activations", "dynamic"), False, "input_activations.dynamic of int-quantized False; only True"),
            (("weights", "symmetric"), False, "int-quantized weights that are not 8 bits, symmetric"),
        ],
    )
    def test_other_int_quantized_checkpoints_are_refused(self, path: tuple[str, ...], value: Any, line: str) -> None:
        with pytest.raises(CheckpointError, match=line):
            CT.read_config(changed(CT.quantization_config(W8A8, [], []), *GROUP, *path, to=value))
