"""compressed-tensors checkpoints, as vLLM, SGLang and transformers read them.

Two layouts: `pack-quantized` for weights of 2, 3, 4 and 8 bits, `int-quantized` for W8A8, where inputs are rounded to
8 bits per token at run time. A linear's bias, and all that is not a quantized linear, keep their names. Opens no file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from awqkit.errors import CheckpointError, FormatError
from awqkit.formats.int_quantized import IntQuantized
from awqkit.formats.pack_quantized import PackQuantized
from awqkit.formats.scheme import SCALE_DTYPES, Scheme, StoredConfig, listed
from awqkit.formats.scheme_config import read_scheme, written_group
from awqkit.formats.serving import (
    fused_partners,
    fused_units,
    holds_experts,
    refuse_split,
    tensor_parallel_cautions,
)
from awqkit.numerics.grid import QuantizedWeight
from awqkit.recipe import PER_CHANNEL

BITS = (2, 3, 4, 8)
PORTABLE_GROUP_SIZES = (32, 64, 128, PER_CHANNEL)
GROUP_SIZES = (256, 128, 64, 32, 16)
OUTPUT_HEAD = "lm_head"
_LAYOUTS: dict[str, PackQuantized | IntQuantized] = {"none": PackQuantized(), "int8": IntQuantized()}


class CompressedTensorsFormat:
    """See the module's docstring; no state, so one instance serves all. Methods as those of `AwqFormat`."""

    name = "compressed-tensors"

    def title(self, scheme: Scheme) -> str:
        """The format and layout, for a model card."""
        return f"compressed-tensors (`{_LAYOUTS[scheme.activations].name}`)"

    def readers(self, scheme: Scheme) -> str:
        """Who reads such a folder, and how, for a model card."""
        how = "with `compressed-tensors` installed"
        if not scheme.symmetric:
            how += ", given `quantization_config=CompressedTensorsConfig(dequantize=True)`"
        return f"vLLM reads this folder as it is (`vllm serve DIR`), SGLang where it has a kernel; transformers {how}."

    def why_not(self, scheme: Scheme) -> str | None:
        """Why no linear can be stored in this scheme, or None."""
        if scheme.activations != "none":
            if (scheme.bits, scheme.group_size, scheme.symmetric) == (8, PER_CHANNEL, True):
                return None
            grid = "a symmetric" if scheme.symmetric else "an asymmetric"
            return (
                f"activations is {scheme.activations} with {scheme.bits} bits, {scheme.groups_text} and {grid} grid; "
                "it takes --bits 8 --group-size channel --symmetric"
            )
        if scheme.bits not in BITS:
            return f"bits is {scheme.bits}; the compressed-tensors format is written with {listed(BITS)} bits"
        if scheme.group_size not in (*GROUP_SIZES, PER_CHANNEL):
            return (
                f"group_size is {scheme.group_size}; the compressed-tensors format is written with "
                f"{listed([*GROUP_SIZES, 'channel'])}"
            )
        return None

    def why_not_held(self, out_features: int, in_features: int, group_size: int) -> str | None:
        """Why a linear of this shape cannot be stored, or None when it can."""
        if group_size == PER_CHANNEL or in_features % group_size == 0:
            return None
        fitting = [str(size) for size in GROUP_SIZES if in_features % size == 0]
        return f"groups of {group_size} do not divide its {in_features} inputs ({listed([*fitting, 'channel'])} would)"

    def cautions(self, linears: Mapping[str, tuple[int, int]], scheme: Scheme) -> list[str]:
        """Lines about readers that will be slow or fail; linears: path -> (out_features, in_features)."""
        if scheme.activations != "none":
            return tensor_parallel_cautions(linears, 1, 1)
        word = 32 // math.gcd(32, scheme.bits)  # codes that fill whole words
        inputs = word if scheme.group_size == PER_CHANNEL else math.lcm(word, scheme.group_size)
        split = tensor_parallel_cautions(linears, inputs, 1 if scheme.symmetric else word)
        experts = []
        if holds_experts(linears) and not scheme.symmetric:
            experts.append("transformers cannot load experts with zero points: --symmetric is for it as well")
        return [*_reader_cautions(scheme), *experts, *split]

    def fused_partners(self, linears: Iterable[str]) -> list[tuple[str, ...]]:
        """Linears that readers fuse and that must agree on precision, see `serving.fused_partners`."""
        return fused_partners(linears)

    def why_shadowed(self, linear: str, outside: Iterable[str]) -> str | None:
        """Why a linear must stay in full precision because another one does: never, readers ask for whole paths."""
        return None

    def tensor_names(self, linear: str, scheme: Scheme) -> tuple[str, ...]:
        """The names on disk that stand for the weight of module path `linear`."""
        return _LAYOUTS[scheme.activations].tensor_names(linear, scheme)

    def tensor_specs(
        self, linear: str, out_features: int, in_features: int, scheme: Scheme, stored_dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> dtype and shape of what `pack` will return. Raises FormatError for an unfit shape."""
        reason = self.why_not_held(out_features, in_features, scheme.group_size)
        if reason:
            raise FormatError(f"{linear}: {reason}")
        if stored_dtype not in SCALE_DTYPES:
            raise FormatError(f"{linear}: scales in {stored_dtype} are not written; use bfloat16 or float16")
        return _LAYOUTS[scheme.activations].tensor_specs(linear, out_features, in_features, scheme, stored_dtype)

    def pack(
        self, linear: str, weight: QuantizedWeight, scheme: Scheme, stored_dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The tensors on disk of one quantized linear. Raises ValueError, see `Scheme.refuse_other_grid`."""
        scheme.refuse_other_grid(linear, weight, stored_dtype)
        return _LAYOUTS[scheme.activations].pack(linear, weight, scheme, stored_dtype)

    def pack_scales(
        self, linear: str, weight: QuantizedWeight, scheme: Scheme, stored_dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Those of `pack` that the group scales alone decide on."""
        scheme.refuse_other_grid(linear, weight, stored_dtype)
        return {f"{linear}.weight_scale": weight.grid.group_scale.to(stored_dtype).contiguous()}

    def quantized_linears(self, tensor_names: Iterable[str], scheme: Scheme) -> list[str]:
        """Module paths of the quantized linears of a checkpoint, in the order of its tensors."""
        marker = _LAYOUTS[scheme.activations].marker
        return [name.removesuffix(marker) for name in tensor_names if name.endswith(marker)]

    def unpack(self, linear: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        """The quantized weight `[N, K]` of module path `linear`; undoes `pack`.

        tensors: at least those of `tensor_names`. Raises CheckpointError when one is missing or misshapen.
        """
        missing = [name for name in self.tensor_names(linear, scheme) if name not in tensors]
        if missing:
            raise CheckpointError(
                f"{linear}: the checkpoint lacks {listed(missing)}; it is not a whole compressed-tensors checkpoint"
            )
        return _LAYOUTS[scheme.activations].unpack(linear, tensors, scheme)

    def linear_shape(self, linear: str, read: Callable[[str], Tensor], scheme: Scheme) -> tuple[int, int]:
        """(out_features, in_features) of a quantized linear; read: a tensor by its name on disk."""
        return _LAYOUTS[scheme.activations].linear_shape(linear, read, scheme)

    def is_symmetric(self, linears: Sequence[str], read: Callable[[str], Tensor], scheme: Scheme) -> bool:
        """Whether every zero point of a checkpoint is the middle code: where none are stored, they are."""
        return scheme.symmetric

    def quantization_config(self, scheme: Scheme, kept: Sequence[str], all_linears: Sequence[str]) -> dict[str, Any]:
        """The `quantization_config` of config.json; no other keys, since readers refuse those that they do not know.

        all_linears, kept: as `AwqFormat.quantization_config` takes them. An entry of `ignore` is a full path: a
        parent covers no children. The output head is always listed, tied or not, as the target `Linear` includes it.
        Raises FormatError when parts of a fused unit disagree, or the head is quantized.
        """
        kept_set = set(kept)
        refuse_split(fused_units(all_linears), kept_set)
        if OUTPUT_HEAD in all_linears and OUTPUT_HEAD not in kept:
            raise FormatError(f"{OUTPUT_HEAD} is quantized, which this format is not written with: keep it (--ignore)")
        layout = _LAYOUTS[scheme.activations].name
        return {
            "quant_method": self.name,
            "format": layout,
            "quantization_status": "compressed",
            "ignore": [*sorted(kept_set - {OUTPUT_HEAD}), OUTPUT_HEAD],
            "config_groups": {"group_0": written_group(scheme, layout)},
        }

    def read_config(self, config: Mapping[str, Any]) -> StoredConfig:
        """A checkpoint's settings from its `quantization_config`. Raises CheckpointError for what is not read here."""
        return StoredConfig(read_scheme(config), tuple(config.get("ignore") or ()))


def _reader_cautions(scheme: Scheme) -> list[str]:
    """What vLLM 0.32, SGLang 0.5 and transformers 5.23 are known to have trouble with."""
    lines = []
    if not scheme.symmetric:
        lines.append(
            "transformers with compressed-tensors 0.18 to 0.20 loads zero points only with "
            "quantization_config=CompressedTensorsConfig(dequantize=True)"
        )
    if scheme.bits not in (4, 8):
        old = "; compressed-tensors before 0.18 expects another layout" if scheme.bits == 3 else ""
        lines.append(
            f"vLLM takes {scheme.bits} bits on CUDA with its optional Humming package only and not on a CPU, "
            f"SGLang takes 4 and 8 bits{old}"
        )
    if scheme.bits == 8:
        zeros = "" if scheme.symmetric else ", and zero points of 8 bits on compute capability 9.0 only"
        lines.append(f"vLLM takes 8 bits on CUDA but not on a CPU{zeros}")
    if scheme.group_size not in PORTABLE_GROUP_SIZES:
        lines.append(f"not every kernel takes groups of {scheme.group_size}; 32, 64, 128 and channel are portable")
    return lines
