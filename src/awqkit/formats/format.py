"""What a format must offer, the table of formats, and which of them a checkpoint is in.

A new format is one file beside `awq.py` and one line in FORMATS.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from awqkit.errors import CheckpointError
from awqkit.formats.awq import AwqFormat, StoredConfig
from awqkit.numerics.grid import QuantizedWeight
from awqkit.recipe import Recipe


class Format(Protocol):
    """One layout of quantized linears on disk; `AwqFormat` documents each method. No files, no state."""

    name: str
    group_sizes: tuple[int, ...]

    def check(self, recipe: Recipe) -> None: ...

    def why_not_held(self, out_features: int, in_features: int, group_size: int) -> str | None: ...

    def cautions(self, linears: Mapping[str, tuple[int, int]], group_size: int) -> list[str]: ...

    def fused_partners(self, linears: Iterable[str]) -> list[tuple[str, ...]]: ...

    def tensor_names(self, linear: str) -> tuple[str, ...]: ...

    def tensor_specs(
        self, linear: str, out_features: int, in_features: int, group_size: int, stored_dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]: ...

    def pack(self, linear: str, weight: QuantizedWeight, stored_dtype: torch.dtype) -> dict[str, Tensor]: ...

    def quantized_linears(self, tensor_names: Iterable[str]) -> list[str]: ...

    def unpack(self, linear: str, tensors: Mapping[str, Tensor], config: StoredConfig) -> QuantizedWeight: ...

    def quantization_config(
        self, bits: int, group_size: int, kept: Sequence[str], all_linears: Sequence[str]
    ) -> dict[str, Any]: ...

    def read_config(self, config: Mapping[str, Any]) -> StoredConfig: ...


FORMATS: dict[str, Format] = {"awq": AwqFormat()}  # by Recipe.format, which is also the `quant_method` on disk


def stored_format(config: Mapping[str, Any]) -> tuple[Format, StoredConfig] | None:
    """The format and settings that a config.json names, or None for a full-precision checkpoint.

    Looks where vLLM looks: the top level, then `text_config`, then `compression_config`. Raises
    CheckpointError for a method that is not in FORMATS.
    """
    text_config = config.get("text_config")
    inner = text_config.get("quantization_config") if isinstance(text_config, Mapping) else None
    settings = config.get("quantization_config") or inner or config.get("compression_config")
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if method not in FORMATS:
        raise CheckpointError(f"the checkpoint is quantized by {method!r}; only {', '.join(FORMATS)} can be read")
    found = FORMATS[method]
    return found, found.read_config(settings)
