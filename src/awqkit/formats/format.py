"""What a format must offer, the table of formats, and which of them a recipe asks for or a checkpoint is in.

A new format is one file beside `awq.py` and one line in FORMATS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from awqkit.errors import CheckpointError, FormatError
from awqkit.formats.awq import AwqFormat
from awqkit.formats.compressed_tensors import CompressedTensorsFormat
from awqkit.formats.scheme import Scheme, StoredConfig
from awqkit.numerics.grid import QuantizedWeight
from awqkit.recipe import Recipe


class Format(Protocol):
    """One layout of quantized linears on disk; `AwqFormat` documents each method. No files, no state."""

    name: str

    def title(self, scheme: Scheme) -> str: ...

    def readers(self, scheme: Scheme) -> str: ...

    def why_not(self, scheme: Scheme) -> str | None: ...

    def why_not_held(self, out_features: int, in_features: int, group_size: int) -> str | None: ...

    def cautions(self, linears: Mapping[str, tuple[int, int]], scheme: Scheme) -> list[str]: ...

    def fused_partners(self, linears: Iterable[str]) -> list[tuple[str, ...]]: ...

    def why_shadowed(self, linear: str, outside: Iterable[str]) -> str | None: ...

    def tensor_names(self, linear: str, scheme: Scheme) -> tuple[str, ...]: ...

    def tensor_specs(
        self, linear: str, out_features: int, in_features: int, scheme: Scheme, stored_dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]: ...

    def pack(
        self, linear: str, weight: QuantizedWeight, scheme: Scheme, stored_dtype: torch.dtype
    ) -> dict[str, Tensor]: ...

    def pack_scales(
        self, linear: str, weight: QuantizedWeight, scheme: Scheme, stored_dtype: torch.dtype
    ) -> dict[str, Tensor]: ...

    def quantized_linears(self, tensor_names: Iterable[str], scheme: Scheme) -> list[str]: ...

    def unpack(self, linear: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight: ...

    def linear_shape(self, linear: str, read: Callable[[str], Tensor], scheme: Scheme) -> tuple[int, int]: ...

    def is_symmetric(self, linears: Sequence[str], read: Callable[[str], Tensor], scheme: Scheme) -> bool: ...

    def quantization_config(
        self, scheme: Scheme, kept: Sequence[str], all_linears: Sequence[str]
    ) -> dict[str, Any]: ...

    def read_config(self, config: Mapping[str, Any]) -> StoredConfig: ...


# By Recipe.format, which is also the `quant_method` on disk.
FORMATS: dict[str, Format] = {"awq": AwqFormat(), "compressed-tensors": CompressedTensorsFormat()}


def format_for(recipe: Recipe) -> Format:
    """The format that the recipe asks for. Raises FormatError where it cannot hold the recipe, naming one that can."""
    scheme, chosen = Scheme.of(recipe), FORMATS[recipe.format]
    reason = chosen.why_not(scheme)
    if reason is None:
        return chosen
    others = [name for name, other in FORMATS.items() if other.why_not(scheme) is None]
    raise FormatError(f"{reason}, use --format {others[0]}" if others else reason)


def stored_format(config: Mapping[str, Any]) -> tuple[Format, StoredConfig] | None:
    """The format and settings that a config.json names, or None for a full-precision checkpoint.

    Looks where vLLM looks: the top level, then `text_config`, then `compression_config`. Raises
    CheckpointError for a method that is not in FORMATS.
    """
    settings = quantization_settings(config)
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if method not in FORMATS:
        raise CheckpointError(f"the checkpoint is quantized by {method!r}; only {', '.join(FORMATS)} can be read")
    found = FORMATS[method]
    return found, found.read_config(settings)


def quantization_settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a config.json says of how its weights are quantized, where vLLM looks for it, or None."""
    text_config = config.get("text_config")
    inner = text_config.get("quantization_config") if isinstance(text_config, Mapping) else None
    return config.get("quantization_config") or inner or config.get("compression_config")


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same config.json saying nothing of it."""
    rest = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    inner = rest.get("text_config")
    if isinstance(inner, Mapping) and "quantization_config" in inner:
        rest["text_config"] = {key: value for key, value in inner.items() if key != "quantization_config"}
    return rest
