"""The checkpoint to start from: as it is, or with its low-bit weights as what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from awqkit.checkpoint.header import TensorSpec
from awqkit.checkpoint.reader import Checkpoint, Derived, refuse_quantized
from awqkit.errors import CheckpointError
from awqkit.formats.format import quantization_settings, without_quantization
from awqkit.formats.low_bit_source import can_dequantize, is_float8, low_bit_weights

_TOLD = (
    "the source's weights are rounded to {} already: they are taken as what they mean, so errors are counted "
    "from there, not from the model that was rounded"
)


@dataclass(frozen=True, slots=True)
class Source:
    """caution: what to tell of weights that were dequantized, or None."""

    checkpoint: Checkpoint
    caution: str | None = None


def open_source(directory: Path) -> Source:
    """The folder with weights in full precision; those in fp8 or compressed-tensors are dequantized as they are read.

    Raises CheckpointError where the weights are quantized in another way, or in a way that is not read here.
    """
    checkpoint = Checkpoint.open(directory)
    settings = quantization_settings(checkpoint.config)
    if not isinstance(settings, Mapping) or not can_dequantize(settings):
        refuse_quantized(checkpoint)
        return Source(checkpoint)
    return _dequantized(checkpoint, settings)


def open_readable(directory: Path) -> Checkpoint:
    """The folder as it can be loaded: float8 weights, which nothing here computes with, as what they mean."""
    checkpoint = Checkpoint.open(directory)
    settings = quantization_settings(checkpoint.config)
    if isinstance(settings, Mapping) and is_float8(settings):
        return _dequantized(checkpoint, settings).checkpoint
    return checkpoint


def _dequantized(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Source:
    stored = {name: (each.spec.dtype, each.spec.shape) for name, each in checkpoint.tensors.items()}
    try:
        found = low_bit_weights(settings, stored, checkpoint.read)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.directory}: {error}") from error
    method = str(settings["quant_method"])
    if not found:
        raise CheckpointError(
            f"{checkpoint.directory}: config.json says {method}, but no tensor is quantized; fetch it again"
        )
    derived = [Derived(TensorSpec(each.name, torch.float32, each.shape), each.parts, each.compute) for each in found]
    return Source(checkpoint.with_derived(derived, without_quantization(checkpoint.config)), _TOLD.format(method))
