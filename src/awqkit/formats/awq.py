"""AWQ checkpoints of version `gemm`, as vLLM, SGLang and transformers read them.

    w[n, k] = (q[n, k] − z[n, k // g]) · Δ[n, k // g]       N outputs, K inputs, groups of g inputs

    M.qweight  int32        [K, N / 8]    codes q, transposed, eight neighbouring outputs in one word (`bits`)
    M.qzeros   int32        [K / g, N / 8]    z, laid out the same way; always written, 8 everywhere if symmetric
    M.scales   model dtype  [K / g, N]    Δ, transposed

A linear's bias, and all that is not a quantized linear, keep their names. Opens no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from awqkit.errors import CheckpointError, FormatError
from awqkit.formats.bits import CODES_PER_WORD, pack_columns, unpack_columns
from awqkit.formats.scheme import SCALE_DTYPES, Scheme, StoredConfig, listed
from awqkit.formats.serving import (
    fused_partners,
    fused_units,
    holds_experts,
    refuse_split,
    tensor_parallel_cautions,
)
from awqkit.numerics.grid import Grid, QuantizedWeight
from awqkit.recipe import PER_CHANNEL

BITS = 4
MIDDLE_CODE = 8.0
MIDDLE_WORD = 0x88888888 - (1 << 32)  # eight of them, as int32 holds it
OUTPUT_HEAD = "lm_head"

# 32, 64 and 128 have fast kernels everywhere; 16 has none on CUDA.
FAST_GROUP_SIZES = (128, 64, 32)
GROUP_SIZES = (*FAST_GROUP_SIZES, 16)


class AwqFormat:
    """See the module's docstring; no state, so one instance serves all."""

    name = "awq"

    def title(self, scheme: Scheme) -> str:
        """The format and layout, for a model card."""
        return "AWQ (`gemm`)"

    def readers(self, scheme: Scheme) -> str:
        """Who reads such a folder, and how, for a model card."""
        return (
            "vLLM and SGLang read this folder as it is (`vllm serve DIR`). transformers reads it with `gptqmodel` "
            "installed."
        )

    def why_not(self, scheme: Scheme) -> str | None:
        """Why no linear can be stored in this scheme, or None.

        Groups of 256 are not known to be read anywhere; one group a row fails under tensor parallelism in vLLM, and
        SGLang divides by the −1 that says so.
        """
        if scheme.activations != "none":
            return f"activations is {scheme.activations}; the awq format holds weights only"
        if scheme.bits != BITS:
            return f"bits is {scheme.bits}; the awq format holds {BITS} bits only"
        if scheme.group_size not in GROUP_SIZES:
            return f"group_size is {scheme.group_size}; readers of the awq format take {listed(GROUP_SIZES)}"
        return None

    def why_not_held(self, out_features: int, in_features: int, group_size: int) -> str | None:
        """Why a linear of this shape cannot be stored, or None when it can."""
        if out_features % CODES_PER_WORD:
            return f"its {out_features} outputs are not a multiple of {CODES_PER_WORD}, the codes of one word"
        if in_features % group_size:
            fitting = [size for size in GROUP_SIZES if in_features % size == 0]
            hint = f"{listed(fitting)} would" if fitting else "nor does any size that the awq format holds"
            return f"groups of {group_size} do not divide its {in_features} inputs ({hint})"
        return None

    def cautions(self, linears: Mapping[str, tuple[int, int]], scheme: Scheme) -> list[str]:
        """Lines about readers that will be slow or fail; linears: path -> (out_features, in_features)."""
        slow, group_size = [], scheme.group_size
        if group_size not in FAST_GROUP_SIZES:
            slow.append(f"no fast CUDA kernel of vLLM or SGLang takes groups of {group_size}; 32, 64 and 128 have one")
        if holds_experts(linears):
            slow.append(
                "transformers loads the experts of an awq checkpoint as random numbers, without an error: it is for "
                "vLLM, SGLang and awqkit.load; compressed-tensors with --symmetric is for transformers as well"
            )
        return slow + tensor_parallel_cautions(linears, group_size, CODES_PER_WORD)

    def fused_partners(self, linears: Iterable[str]) -> list[tuple[str, ...]]:
        """Linears that readers fuse and that must agree on precision, see `serving.fused_partners`."""
        return fused_partners(linears)

    def why_shadowed(self, linear: str, outside: Iterable[str]) -> str | None:
        """Why a linear must stay in full precision because one of `outside`, which no block holds, does; or None."""
        entry = next((entry for entry in outside if entry in linear), None)
        if entry is None:
            return None
        return f"its path contains {entry}, which is no block's: vLLM and SGLang would keep it in full precision, too"

    def tensor_names(self, linear: str, scheme: Scheme) -> tuple[str, ...]:
        """The names on disk that stand for the weight of module path `linear`."""
        return f"{linear}.qweight", f"{linear}.qzeros", f"{linear}.scales"

    def tensor_specs(
        self, linear: str, out_features: int, in_features: int, scheme: Scheme, stored_dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> dtype and shape of what `pack` will return. Raises FormatError for an unfit shape."""
        reason = self.why_not_held(out_features, in_features, scheme.group_size)
        if reason:
            raise FormatError(f"{linear}: {reason}")
        if stored_dtype not in SCALE_DTYPES:
            raise FormatError(f"{linear}: scales in {stored_dtype} are read by nobody; use bfloat16 or float16")
        words, groups = out_features // CODES_PER_WORD, in_features // scheme.group_size
        qweight, qzeros, scales = self.tensor_names(linear, scheme)
        return {
            qweight: (torch.int32, (in_features, words)),
            qzeros: (torch.int32, (groups, words)),
            scales: (stored_dtype, (groups, out_features)),
        }

    def pack(
        self, linear: str, weight: QuantizedWeight, scheme: Scheme, stored_dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The tensors on disk of one quantized linear, contiguous, on the device of `weight`.

        weight: codes `[N, K]` uint8 on a grid of the scheme. Raises ValueError when it is on another one, see
        `Scheme.refuse_other_grid`.
        """
        scales = self.pack_scales(linear, weight, scheme, stored_dtype)
        qweight, qzeros, _ = self.tensor_names(linear, scheme)
        return {
            qweight: pack_columns(weight.codes.t()),
            qzeros: pack_columns(weight.grid.group_zero.to(torch.uint8).t()),
            **scales,
        }

    def pack_scales(
        self, linear: str, weight: QuantizedWeight, scheme: Scheme, stored_dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Those of `pack` that the group scales alone decide on."""
        scheme.refuse_other_grid(linear, weight, stored_dtype)
        scales = self.tensor_names(linear, scheme)[-1]
        return {scales: weight.grid.group_scale.to(stored_dtype).t().contiguous()}

    def quantized_linears(self, tensor_names: Iterable[str], scheme: Scheme) -> list[str]:
        """Module paths of the quantized linears of a checkpoint, in the order of its tensors."""
        return [name.removesuffix(".qweight") for name in tensor_names if name.endswith(".qweight")]

    def unpack(self, linear: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        """The quantized weight `[N, K]` of module path `linear`, on the tensors' device; undoes `pack`.

        tensors: at least those of `tensor_names`. Raises CheckpointError when one is missing or misshapen.
        """
        names = self.tensor_names(linear, scheme)
        missing = [name for name in names if name not in tensors]
        if missing:
            raise CheckpointError(f"{linear}: the checkpoint lacks {listed(missing)}; it is not a whole awq checkpoint")
        qweight, qzeros, scales = (tensors[name] for name in names)
        in_features, words = qweight.shape if qweight.dim() == 2 else (0, 0)
        group_size = scheme.columns(in_features)
        groups, rest = divmod(in_features, group_size) if in_features else (0, 1)
        if rest or qzeros.shape != (groups, words) or scales.shape != (groups, words * CODES_PER_WORD):
            raise CheckpointError(
                f"{linear}: qweight {tuple(qweight.shape)}, qzeros {tuple(qzeros.shape)} and scales "
                f"{tuple(scales.shape)} do not fit together with groups of {scheme.group_size}"
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

    def linear_shape(self, linear: str, read: Callable[[str], Tensor], scheme: Scheme) -> tuple[int, int]:
        """(out_features, in_features) of a quantized linear; read: a tensor by its name on disk."""
        qweight, _, scales = self.tensor_names(linear, scheme)
        if scheme.group_size == PER_CHANNEL:
            return read(scales).shape[1], read(qweight).shape[0]
        groups, out_features = read(scales).shape
        return out_features, groups * scheme.group_size

    def is_symmetric(self, linears: Sequence[str], read: Callable[[str], Tensor], scheme: Scheme) -> bool:
        """Whether every zero point of a checkpoint is the middle code; read: a tensor by its name on disk."""
        zeros = (read(self.tensor_names(linear, scheme)[1]) for linear in linears)
        return all(bool((zero == MIDDLE_WORD).all()) for zero in zeros)

    def quantization_config(self, scheme: Scheme, kept: Sequence[str], all_linears: Sequence[str]) -> dict[str, Any]:
        """The `quantization_config` of config.json.

        all_linears: full module paths. kept: those that are not quantized, also by their path on disk where
        that differs. The list on disk gets these, fused units of which every part is kept, and the output
        head. Raises FormatError when servers could not load the split: parts of a fused unit disagree, or a
        kept path is part of a quantized one.
        """
        kept_set = set(kept)
        units = fused_units(all_linears)
        whole = [unit.path for unit in units if kept_set.issuperset(unit.parts)]
        named = {*kept, *whole}
        entries = [*sorted(path for path in named - {OUTPUT_HEAD} if not _is_below(path, named)), OUTPUT_HEAD]
        refuse_split(units, kept_set)
        _refuse_shadowed(entries, [linear for linear in all_linears if linear not in kept_set])
        _refuse_shadowed(entries, [unit.path for unit in units if unit.path not in whole])
        return {
            "quant_method": self.name,
            "version": "gemm",
            "bits": scheme.bits,
            "group_size": scheme.group_size,
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
        return StoredConfig(Scheme(BITS, group_size, False), tuple(config.get("modules_to_not_convert") or ()))


def _is_below(path: str, named: set[str]) -> bool:
    """Whether a parent of `path` is named too, which covers it: readers look for an entry inside a path."""
    parent = path.rpartition(".")[0]
    while parent:
        if parent in named:
            return True
        parent = parent.rpartition(".")[0]
    return False


def _refuse_shadowed(entries: Sequence[str], quantized: Sequence[str]) -> None:
    for path in quantized:
        entry = next((entry for entry in entries if entry in path), None)
        if entry is not None:
            raise FormatError(
                f"{entry} is kept and {path} quantized, but vLLM and SGLang keep every module whose path "
                "contains an entry: keep both (--ignore) or none"
            )
