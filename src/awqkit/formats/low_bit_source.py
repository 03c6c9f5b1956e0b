"""Weights that a checkpoint has in few bits, as what they mean: sources that were released that way.

    fp8                  M.weight            float8  [N, K]        W = q · Δ, each Δ for one block of q, for one row,
                         M.weight_scale_inv  float   [N/n, K/k]    or for all of it; the names differ, the meaning
                      or M.weight_scale      float   [] or [N, 1]  does not ("inv" notwithstanding)
    compressed-tensors   float-quantized as above; pack-quantized and int-quantized as this package writes them

A stack of experts, `[E, N, K]`, has a stack of scales. Opens no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from awqkit.errors import CheckpointError
from awqkit.formats.compressed_tensors import CompressedTensorsFormat
from awqkit.formats.scheme import listed
from awqkit.numerics.grid import dequantize

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FP8, COMPRESSED = "fp8", "compressed-tensors"
_SCALES = ("_scale_inv", "_scale")  # after the weight's name
_BESIDE = (".input_scale", ".activation_scale", ".input_global_scale")  # of the inputs; nothing here rounds those
_FLOAT_LAYOUTS = ("float-quantized", "naive-quantized")

Stored = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # name on disk -> dtype and shape
Read = Callable[[str], Tensor]
_Sharing = tuple[tuple[int, ...], tuple[int, int]]


@dataclass(frozen=True, slots=True)
class LowBitWeight:
    """One weight. name, shape: of what it means. parts: names on disk of all that goes into it, or goes with it.

    compute: from the parts by name to the weight, float32.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    compute: Callable[[Mapping[str, Tensor]], Tensor]


def low_bit_weights(settings: Mapping[str, Any], stored: Stored, read: Read) -> list[LowBitWeight]:
    """All weights of a checkpoint that its `quantization_config` is about.

    Raises CheckpointError for a scheme that is not read here, and for a low-bit tensor without its scale.
    """
    if settings.get("quant_method") == FP8 or _float_layout(settings):
        return _float8(settings, stored)
    layout, scheme = CompressedTensorsFormat(), CompressedTensorsFormat().read_config(settings).scheme
    found = []
    for linear in layout.quantized_linears(stored, scheme):
        parts = layout.tensor_names(linear, scheme)

        def compute(tensors: Mapping[str, Tensor], linear: str = linear) -> Tensor:
            weight = layout.unpack(linear, tensors, scheme)
            return dequantize(weight.codes, weight.grid)

        shape = layout.linear_shape(linear, read, scheme)
        found.append(LowBitWeight(f"{linear}.weight", shape, (*parts, *_beside(linear, stored)), compute))
    return found


def can_dequantize(settings: Mapping[str, Any]) -> bool:
    """Whether `low_bit_weights` is for a checkpoint with these settings; it may still find what it cannot read."""
    return settings.get("quant_method") in (FP8, COMPRESSED)


def is_float8(settings: Mapping[str, Any]) -> bool:
    """Whether the weights are float8, which no format here stores."""
    return settings.get("quant_method") == FP8 or _float_layout(settings)


def _float_layout(settings: Mapping[str, Any]) -> bool:
    if settings.get("quant_method") != COMPRESSED:
        return False
    groups = settings.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    weights = first.get("weights") if isinstance(first, Mapping) else None
    is_float = isinstance(weights, Mapping) and weights.get("type") == "float" and weights.get("num_bits") == 8
    layout = (first or {}).get("format") or settings.get("format")
    return is_float and layout in _FLOAT_LAYOUTS


def _float8(settings: Mapping[str, Any], stored: Stored) -> list[LowBitWeight]:
    block = _block_size(settings)
    found = []
    for name, (dtype, shape) in stored.items():
        if dtype not in FLOAT8:
            continue
        scale = next((name + suffix for suffix in _SCALES if name + suffix in stored), None)
        if scale is None:
            raise CheckpointError(
                f"tensor {name} is float8 and has no {listed([name + suffix for suffix in _SCALES])} beside it, "
                "so what its numbers mean is not known; fetch the checkpoint again, or give the bf16 one"
            )
        sharing = _sharing(name, shape, scale, stored[scale][1], block)

        def compute(
            tensors: Mapping[str, Tensor], name: str = name, scale: str = scale, sharing: _Sharing = sharing
        ) -> Tensor:
            return scaled_blocks(tensors[name].float(), tensors[scale].float().reshape(sharing[0]), sharing[1])

        parts = (name, scale, *_beside(name.rpartition(".")[0], stored))
        found.append(LowBitWeight(name, shape, parts, compute))
    return found


def scaled_blocks(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """`codes` `[..., N, K]` float32 times the scale of the block that each is in, `[..., ⌈N/n⌉, ⌈K/k⌉]` float32."""
    rows, columns = codes.shape[-2:]
    expanded = scale.repeat_interleave(block[0], dim=-2)[..., :rows, :]
    return codes * expanded.repeat_interleave(block[1], dim=-1)[..., :columns]


def _sharing(
    name: str, shape: tuple[int, ...], scale: str, found: tuple[int, ...], block: tuple[int, int] | None
) -> _Sharing:
    """The scale's shape with as many dimensions as the weight's, and the rows and columns that share one.

    found: the scale's shape on disk. Raises CheckpointError where it fits no way of sharing.
    """
    if len(shape) < 2:
        raise CheckpointError(f"tensor {name} is float8 {list(shape)}; only matrices and stacks of them can be read")
    *stack, rows, columns = shape
    ways = {(*stack, rows, 1): (1, columns), (*stack, 1, 1): (rows, columns)}
    if block is not None:
        ways = {(*stack, -(-rows // block[0]), -(-columns // block[1])): block}
    whole = (1,) * len(shape)
    for wanted, sizes in {**ways, whole: (rows, columns)}.items():
        if found == wanted or _without_ones(found) == _without_ones(wanted):
            return wanted, sizes
    raise CheckpointError(
        f"tensor {scale} is {list(found)}, which fits no blocks of {name} {list(shape)}; expected "
        f"{listed([list(way) for way in ways])}"
    )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _block_size(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """What config.json says of the blocks; None where a scale is for a row or for all."""
    size = settings.get("weight_block_size")
    groups = settings.get("config_groups")
    if size is None and isinstance(groups, Mapping):
        size = next(iter(groups.values()))["weights"].get("block_structure")
    if size is None:
        return None
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)):
        raise CheckpointError(f"quantization_config has blocks of {size!r}; expected two positive numbers")
    return size[0], size[1]


def _beside(linear: str, stored: Stored) -> tuple[str, ...]:
    return tuple(linear + suffix for suffix in _BESIDE if linear + suffix in stored)
