"""Low-bit weights of a source mean what their numbers and scales say, and what cannot be read is named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awqkit.errors import CheckpointError
from awqkit.formats.low_bit_source import can_dequantize, is_float8, low_bit_weights, scaled_blocks

FP8 = {"quant_method": "fp8", "weight_block_size": [4, 8]}
FLOAT_GROUP = {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"}}


def _weights(settings: dict, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    stored = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    found = low_bit_weights(settings, stored, tensors.__getitem__)
    computed = {each.name: each.compute({part: tensors[part] for part in each.parts}) for each in found}
    assert all(tuple(computed[each.name].shape) == each.shape for each in found)
    return computed


def _codes(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)


def test_each_block_has_its_scale() -> None:
    codes, scale = _codes(10, 19), torch.rand(3, 3, generator=torch.Generator().manual_seed(1))
    expected = torch.zeros(10, 19, dtype=torch.float64)
    for row in range(10):
        for column in range(19):
            expected[row, column] = float(codes[row, column]) * float(scale[row // 4, column // 8])
    torch.testing.assert_close(scaled_blocks(codes.float(), scale, (4, 8)).double(), expected)
    found = _weights(FP8, {"a.weight": codes, "a.weight_scale_inv": scale, "a.bias": torch.ones(10)})
    assert list(found) == ["a.weight"]
    torch.testing.assert_close(found["a.weight"].double(), expected)


@pytest.mark.parametrize(
    ("shape", "scale_shape"),
    [((6, 8), ()), ((6, 8), (1,)), ((6, 8), (1, 1)), ((6, 8), (6, 1)), ((6, 8), (6,)), ((3, 6, 8), (3,)),
     ((3, 6, 8), (3, 1, 1)), ((3, 6, 8), (3, 6, 1)), ((3, 6, 8), (3, 6)), ((3, 6, 8), ())],
)  # fmt: skip
def test_rows_and_whole_weights_share_scales(shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> None:
    codes = _codes(*shape)
    scale = 1 + torch.rand(scale_shape, generator=torch.Generator().manual_seed(1))
    along = scale.reshape(*scale_shape, *(1,) * (len(shape) - len(scale_shape))) if scale.numel() > 1 else scale.max()
    found = _weights({"quant_method": "fp8"}, {"m": codes, "m_scale": scale})
    torch.testing.assert_close(found["m"], codes.float() * along)


def test_stacks_have_stacks_of_blocks() -> None:
    codes, scale = _codes(3, 8, 16), torch.rand(3, 2, 2)
    found = _weights(FP8, {"experts.up": codes, "experts.up_scale_inv": scale})["experts.up"]
    for expert in range(3):
        torch.testing.assert_close(found[expert], scaled_blocks(codes[expert].float(), scale[expert], (4, 8)))


def test_scales_of_inputs_go_with_the_weight() -> None:
    tensors = {"a.weight": _codes(4, 8), "a.weight_scale": torch.ones(()), "a.input_scale": torch.ones(())}
    stored = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    (found,) = low_bit_weights({"quant_method": "fp8"}, stored, tensors.__getitem__)
    assert set(found.parts) == set(tensors)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.weight": _codes(4, 8)}, r"a\.weight is float8 and has no a\.weight_scale_inv and a\.weight_scale beside"),
        ({"a.weight": _codes(4, 8), "a.weight_scale_inv": torch.ones(3, 8)}, r"\[3, 8\], which fits no blocks"),
        ({"a": _codes(8), "a_scale": torch.ones(8)}, r"only matrices and stacks"),
    ],
)
def test_what_cannot_be_read_is_named(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        _weights(FP8, tensors)


def test_blocks_that_are_no_two_numbers_are_refused() -> None:
    with pytest.raises(CheckpointError, match="blocks of 128; expected two"):
        _weights({"quant_method": "fp8", "weight_block_size": 128}, {})


def test_which_settings_are_for_it() -> None:
    floats = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"g": FLOAT_GROUP}}
    ints = {**floats, "format": "pack-quantized", "config_groups": {"g": {"weights": {"num_bits": 4, "type": "int"}}}}
    assert can_dequantize(FP8) and can_dequantize(floats) and can_dequantize(ints)
    assert not can_dequantize({"quant_method": "gptq"})
    assert is_float8(FP8) and is_float8(floats) and not is_float8(ints)
    codes = _codes(4, 8)
    found = _weights(floats, {"a.weight": codes, "a.weight_scale": torch.full((4, 1), 0.5)})
    torch.testing.assert_close(found["a.weight"], 0.5 * codes.float())


def test_a_layout_of_compressed_tensors_that_is_not_read_is_named() -> None:
    group = {"weights": {"type": "float", "num_bits": 4, "group_size": 16}, "format": "nvfp4-pack-quantized"}
    with pytest.raises(CheckpointError, match="nvfp4-pack-quantized"):
        _weights({"quant_method": "compressed-tensors", "config_groups": {"g": group}}, {})
