"""AWQ checkpoints of version `gemm`, as vLLM, SGLang and transformers read them.

    w[n, k] = (q[n, k] − z[n, k // g]) · Δ[n, k // g]       N outputs, K inputs, groups of g inputs

    M.qweight  int32        [K, N / 8]    codes q, transposed, eight neighbouring outputs in one word (`bits`)
    M.qzeros   int32        [K / g, N / 8]    z, laid out the same way; always written, 8 everywhere if
    symmetric M.scales   model dtype  [K / g, N]    Δ, transposed

A linear's bias, and all that is not a quantized linear, keep their names. Opens no file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from awqkit.errors import CheckpointError, FormatError
from awqkit.formats.bits import CODES_PER_WORD, pack_columns, unpack_columns
from awqkit.formats.serving import FusedUnit, fused_partners, fused_units, tensor_parallel_cautions
from awqkit.numerics.grid import Grid, QuantizedWeight
from awqkit.recipe import Recipe

BITS = 4
MIDDLE_CODE = 8.0
OUTPUT_HEAD = "lm_head"

# 32, 64 and 128 have fast kernels everywhere; 16 has none on CUDA.
FAST_GROUP_SIZES = (128, 64, 32)
GROUP_SIZES = (*FAST_GROUP_SIZES, 16)
_SCALE_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class StoredConfig:
    """What a checkpoint says of its quantized linears. group_size −1: one group per output row.

    kept: the entries of `modules_to_not_convert`, as they are.
    """

    bits: int
    group_size: int
    kept: tuple[str, ...]


class AwqFormat:
    """See the module's docstring; no state, so one instance serves all."""

    name = "awq"
    group_sizes = GROUP_SIZES

    def check(self, recipe: Recipe) -> None:
        """Raises FormatError when the format cannot hold the recipe's bits or group size."""
        if recipe.bits != BITS:
            raise FormatError(f"bits is {recipe.bits}; the awq format holds {BITS} bits only, use --bits {BITS}")
        if recipe.group_size is not None and recipe.group_size not in GROUP_SIZES:
            raise FormatError(
                f"group_size is {recipe.group_size}; readers of the awq format take {_listed(GROUP_SIZES)}"
            )

    def why_not_held(self, out_features: int, in_features: int, group_size: int) -> str | None:
        """Why a linear of this shape cannot be stored, or None when it can."""
        if out_features % CODES_PER_WORD:
            return f"its {out_features} outputs are not a multiple of {CODES_PER_WORD}, the codes of one word"
        if in_features % group_size:
            fitting = [size for size in GROUP_SIZES if in_features % size == 0]
            hint = f"{_listed(fitting)} would" if fitting else "nor does any size that the awq format holds"
            return f"groups of {group_size} do not divide its {in_features} inputs ({hint})"
        return None

    def cautions(self, linears: Mapping[str, tuple[int, int]], group_size: int) -> list[str]:
        """Lines about readers that will be slow or fail; linears: path -> (out_features, in_features)."""
        slow = []
        if group_size not in FAST_GROUP_SIZES:
            slow.append(f"no fast CUDA kernel of vLLM or SGLang takes groups of {group_size}; 32, 64 and 128 have one")
        return slow + tensor_parallel_cautions(linears, group_size, CODES_PER_WORD)

    def fused_partners(self, linears: Iterable[str]) -> list[tuple[str, ...]]:
        """Linears that readers fuse and that must agree on precision, see `serving.fused_partners`."""
        return fused_partners(linears)

    def tensor_names(self, linear: str) -> tuple[str, str, str]:
        """The names on disk that stand for the weight of module path `linear`."""
        return f"{linear}.qweight", f"{linear}.qzeros", f"{linear}.scales"

    def tensor_specs(
        self, linear: str, out_features: int, in_features: int, group_size: int, stored_dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> dtype and shape of what `pack` will return. Raises FormatError for an unfit shape."""
        reason = self.why_not_held(out_features, in_features, group_size)
        if reason:
            raise FormatError(f"{linear}: {reason}")
        if stored_dtype not in _SCALE_DTYPES:
            raise FormatError(f"{linear}: scales in {stored_dtype} are read by nobody; use bfloat16 or float16")
        words, groups = out_features // CODES_PER_WORD, in_features // group_size
        qweight, qzeros, scales = self.tensor_names(linear)
        return {
            qweight: (torch.int32, (in_features, words)),
            qzeros: (torch.int32, (groups, words)),
            scales: (stored_dtype, (groups, out_features)),
        }

    def pack(self, linear: str, weight: QuantizedWeight, stored_dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors on disk of one quantized linear, contiguous, on the device of `weight`.

        weight: codes `[N, K]` uint8 on a 4-bit grid. Raises ValueError when a Δ is not exact in
        `stored_dtype` or a zero point is no code: then readers would compute with other weights than the ones
        that were measured.
        """
        grid = weight.grid
        scales, zeros = grid.group_scale.to(stored_dtype), grid.group_zero.to(torch.uint8)
        if grid.bits != BITS or weight.codes.shape[1] != grid.group_size * grid.group_scale.shape[1]:
            raise ValueError(f"{linear}: a grid of {grid.bits} bits and groups of {grid.group_size} does not fit awq")
        if not torch.equal(scales.float(), grid.group_scale.float()):
            raise ValueError(f"{linear}: a group scale is not exact in {stored_dtype}")
        if not torch.equal(zeros.float(), grid.group_zero.float()):
            raise ValueError(f"{linear}: a zero point is not a whole number from 0 to 15")
        qweight, qzeros, scales_name = self.tensor_names(linear)
        return {
            qweight: pack_columns(weight.codes.t()),
            qzeros: pack_columns(zeros.t()),
            scales_name: scales.t().contiguous(),
        }

    def quantized_linears(self, tensor_names: Iterable[str]) -> list[str]:
        """Module paths of the quantized linears of a checkpoint, in the order of its tensors."""
        return [name.removesuffix(".qweight") for name in tensor_names if name.endswith(".qweight")]

    def unpack(self, linear: str, tensors: Mapping[str, Tensor], config: StoredConfig) -> QuantizedWeight:
        """The quantized weight `[N, K]` of module path `linear`, on the tensors' device; undoes `pack`.

        tensors: at least those of `tensor_names(linear)`. Raises CheckpointError when one is missing or
        misshapen.
        """
        missing = [name for name in self.tensor_names(linear) if name not in tensors]
        if missing:
            raise CheckpointError(
                f"{linear}: the checkpoint lacks {_listed(missing)}; it is not a whole awq checkpoint"
            )
        qweight, qzeros, scales = (tensors[name] for name in self.tensor_names(linear))
        in_features, words = qweight.shape if qweight.dim() == 2 else (0, 0)
        group_size = in_features if config.group_size == -1 else config.group_size
        groups, rest = divmod(in_features, group_size) if in_features else (0, 1)
        if rest or qzeros.shape != (groups, words) or scales.shape != (groups, words * CODES_PER_WORD):
            raise CheckpointError(
                f"{linear}: qweight {tuple(qweight.shape)}, qzeros {tuple(qzeros.shape)} and scales "
                f"{tuple(scales.shape)} do not fit together with groups of {config.group_size}"
            )
        if qweight.dtype != torch.int32 or qzeros.dtype != torch.int32 or not scales.is_floating_point():
            raise CheckpointError(
                f"{linear}: its three tensors are {qweight.dtype}, {qzeros.dtype} and {scales.dtype}, "
                "expected int32, int32 and a floating-point dtype"
            )
        codes = unpack_columns(qweight).t().contiguous()
        group_zero = unpack_columns(qzeros).t().to(torch.float32).contiguous()
        symmetric = bool((group_zero == MIDDLE_CODE).all())
        return QuantizedWeight(codes, Grid(BITS, group_size, symmetric, scales.t().float().contiguous(), group_zero))

    def quantization_config(
        self, bits: int, group_size: int, kept: Sequence[str], all_linears: Sequence[str]
    ) -> dict[str, Any]:
        """The `quantization_config` of config.json.

        all_linears: full module paths. kept: those that are not quantized, also by their path on disk where
        that differs. The list on disk gets these, fused units of which every part is kept, and the output
        head. Raises FormatError when servers could not load the split: parts of a fused unit disagree, or a
        kept path is part of a quantized one.
        """
        kept_set = set(kept)
        units = fused_units(all_linears)
        whole = [unit.path for unit in units if kept_set.issuperset(unit.parts)]
        entries = [*sorted({*kept, *whole} - {OUTPUT_HEAD}), OUTPUT_HEAD]
        _refuse_split(units, kept_set)
        _refuse_shadowed(entries, [linear for linear in all_linears if linear not in kept_set])
        _refuse_shadowed(entries, [unit.path for unit in units if unit.path not in whole])
        return {
            "quant_method": self.name,
            "version": "gemm",
            "bits": bits,
            "group_size": group_size,
            "zero_point": True,  # also with symmetric codes: false would leave the fast kernels
            "modules_to_not_convert": entries,
        }

    def read_config(self, config: Mapping[str, Any]) -> StoredConfig:
        """A checkpoint's settings from its `quantization_config`. Raises CheckpointError if unknown."""
        version = config.get("version") or "gemm"
        if not isinstance(version, str) or version.lower() != "gemm":
            raise CheckpointError(
                f"quantization_config has version {version!r}, another layout; only 'gemm' can be read"
            )
        bits = config.get("bits", config.get("w_bit", BITS))
        group_size = config.get("group_size", config.get("q_group_size", 128))
        if bits != BITS:
            raise CheckpointError(f"quantization_config has {bits!r} bits; awq checkpoints hold {BITS}")
        if not isinstance(group_size, int) or isinstance(group_size, bool) or not (group_size > 0 or group_size == -1):
            raise CheckpointError(
                f"quantization_config has group_size {group_size!r}; expected a positive number or -1"
            )
        return StoredConfig(BITS, group_size, tuple(config.get("modules_to_not_convert") or ()))


def _refuse_split(units: Sequence[FusedUnit], kept: Collection[str]) -> None:
    for unit in units:
        inside = [part for part in unit.parts if part in kept]
        outside = [part for part in unit.parts if part not in kept]
        if inside and outside:
            raise FormatError(
                f"{inside[0]} is kept and {outside[0]} quantized, but servers hold both in one {unit.path}: "
                "keep all of its parts (--ignore) or none"
            )


def _refuse_shadowed(entries: Sequence[str], quantized: Sequence[str]) -> None:
    for path in quantized:
        entry = next((entry for entry in entries if entry in path), None)
        if entry is not None:
            raise FormatError(
                f"{entry} is kept and {path} quantized, but vLLM and SGLang keep every module whose path "
                "contains an entry: keep both (--ignore) or none"
            )


def _listed(items: Sequence[object]) -> str:
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last
