"""`load`: a written checkpoint as a transformers model that computes with the packed weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from awqkit.api.device import choose_device
from awqkit.api.source import open_readable
from awqkit.checkpoint.hub import resolve_model
from awqkit.evaluation.load import load_checkpoint


def load(
    directory: str | Path, *, dtype: torch.dtype | None = None, device: str = "auto", trust_remote_code: bool = False
) -> nn.Module:
    """The transformers model of a checkpoint folder or hub id, quantized or not, in eval mode; `generate` works.

    dtype: of activations and of everything that is not packed; None keeps the stored one. In bfloat16 the packed
    linears use torch's int4 kernel where it fits, in other dtypes they are dequantized for every product, exactly.
    Raises AwqkitError.
    """
    checkpoint = open_readable(resolve_model(directory))
    return load_checkpoint(checkpoint, dtype, choose_device(device), trust_remote_code=trust_remote_code)
