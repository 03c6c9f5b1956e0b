"""A checkpoint that our writer and format produce means the same weights to somebody else's code.

The reader is the AWQ converter of compressed-tensors (0.18 and later): no line of this package is in it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from awqkit.checkpoint.header import TensorSpec
from awqkit.checkpoint.reader import Checkpoint
from awqkit.checkpoint.writer import CheckpointWriter, plan_layout
from awqkit.formats.format import FORMATS, stored_format
from awqkit.formats.scheme import Scheme
from awqkit.numerics.grid import (
    Grid,
    QuantizedWeight,
    choose_scale_and_zero,
    dequantize,
    group_range,
    nearest_codes,
)

convert = pytest.importorskip(
    "compressed_tensors.entrypoints.convert",
    reason="the independent reader, compressed-tensors, is not installed",
)

GROUP_SIZE = 32
SHAPES = {
    "model.layers.0.self_attn.q_proj": (64, 96),
    "model.layers.0.self_attn.o_proj": (96, 64),
    "model.layers.0.mlp.down_proj": (8, 32),
}
KEPT = "model.layers.0.mlp.gate_proj"
AWQ, SCHEME = FORMATS["awq"], Scheme(4, GROUP_SIZE, False)


def quantize(shape: tuple[int, int], dtype: torch.dtype, symmetric: bool, seed: int) -> QuantizedWeight:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    weight[0] = weight[0].abs() + 1  # a row far from zero
    low, high = group_range(weight.reshape(shape[0], -1, GROUP_SIZE))
    scale, zero = choose_scale_and_zero(low, high, bits=4, symmetric=symmetric, stored_dtype=dtype)
    grid = Grid(4, GROUP_SIZE, symmetric, scale, zero)
    return QuantizedWeight(nearest_codes(weight, grid), grid)


def write(out: Path, weights: dict[str, QuantizedWeight], dtype: torch.dtype, max_shard_bytes: int) -> None:
    specs = [TensorSpec(f"{KEPT}.weight", dtype, (8, 32))]
    for name, (rows, columns) in SHAPES.items():
        for part, (kind, shape) in AWQ.tensor_specs(name, rows, columns, SCHEME, dtype).items():
            specs.append(TensorSpec(part, kind, shape))
    with CheckpointWriter(out, plan_layout(specs, max_shard_bytes), overwrite=False) as writer:
        writer.write(f"{KEPT}.weight", torch.ones(8, 32, dtype=dtype))
        for name, weight in weights.items():
            for part, tensor in AWQ.pack(name, weight, SCHEME, dtype).items():
                writer.write(part, tensor)
        block = AWQ.quantization_config(SCHEME, [KEPT], [*SHAPES, KEPT])
        writer.write_json("config.json", {"architectures": ["LlamaForCausalLM"], "quantization_config": block})
        writer.commit()


def value_of(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The float32 weight of a linear in the converter's layout, by compressed-tensors' own unpacking."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    rows, columns = SHAPES[name]
    scale = tensors[f"{name}.weight_scale"].float()
    codes = unpack_from_int32(tensors[f"{name}.weight_packed"], 4, torch.Size((rows, columns))).float()
    packed_zero = tensors[f"{name}.weight_zero_point"]
    zero = unpack_from_int32(packed_zero, 4, torch.Size(scale.shape), packed_dim=0).float()
    return (codes - zero.repeat_interleave(GROUP_SIZE, 1)) * scale.repeat_interleave(GROUP_SIZE, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 2000])
def test_the_converter_reads_exactly_our_weights(
    tmp_path: Path, dtype: torch.dtype, symmetric: bool, max_shard_bytes: int
) -> None:
    weights = {name: quantize(shape, dtype, symmetric, seed) for seed, (name, shape) in enumerate(SHAPES.items())}
    write(tmp_path / "awq", weights, dtype, max_shard_bytes)

    checkpoint = Checkpoint.open(tmp_path / "awq")
    converter = convert.AutoAWQConverter.from_autoawq_config(dict(checkpoint.config["quantization_config"]))
    tensors: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "awq").glob("*.safetensors"):
        tensors |= load_file(file)
    converter.validate(dict(tensors))
    converted = converter.process(dict(tensors))

    found = stored_format(checkpoint.config)
    assert found is not None
    ours, config = found
    assert sorted(ours.quantized_linears(checkpoint.names, config.scheme)) == sorted(SHAPES)
    for name, weight in weights.items():
        expected = dequantize(weight.codes, weight.grid)
        assert torch.equal(value_of(converted, name), expected)
        back = ours.unpack(name, checkpoint.read_many(ours.tensor_names(name, config.scheme)), config.scheme)
        assert torch.equal(dequantize(back.codes, back.grid), expected)
    assert torch.equal(converted[f"{KEPT}.weight"], torch.ones(8, 32, dtype=dtype))
