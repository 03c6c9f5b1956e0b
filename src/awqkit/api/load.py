"""`load`: a written checkpoint as a model that computes with the packed weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from awqkit.api.device import choose_device
from awqkit.api.source import open_readable
from awqkit.checkpoint.hub import resolve_model
from awqkit.checkpoint.reader import Checkpoint
from awqkit.evaluation.fill_module import load_into
from awqkit.evaluation.load import load_checkpoint


def load(
    directory: str | Path,
    *,
    into: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> nn.Module:
    """The transformers model of a checkpoint folder or hub id, quantized or not, in eval mode; `generate` works.

    into: for the folder of a PlainModel, an instance of the module's class and size, whatever its parameters hold; it
    is filled, its quantized linears give way to packed ones, and it is what is returned.
    dtype: of activations and of everything that is not packed; None keeps the stored one. 4-bit linears use
    an int4 kernel in bfloat16, and on a GPU with Triton in float16 too, where one fits; everything else is dequantized
    for every product, exactly.
    Raises AwqkitError.
    """
    if into is not None:
        checkpoint = Checkpoint.open(resolve_model(directory), of_known_class=False)
        return load_into(into, checkpoint, dtype, choose_device(device))
    checkpoint = open_readable(resolve_model(directory))
    return load_checkpoint(checkpoint, dtype, choose_device(device), trust_remote_code=trust_remote_code)
