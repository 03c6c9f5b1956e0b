"""A block that computes with quantized weights in the original's units: the folded model's function, unfolded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from awqkit.methods.linear import QuantizedLinear
from awqkit.model.observe import LinearWatch
from awqkit.model.skeleton import run_block
from awqkit.numerics.activations import round_tokens
from awqkit.pipeline.activations import HiddenStates
from awqkit.pipeline.context import BlockContext


@contextmanager
def weights_replaced(context: BlockContext, quantized: Mapping[str, QuantizedLinear]) -> Iterator[None]:
    """Inside, the linears named compute with what their codes mean; for W8A8 their inputs are rounded, too."""
    parameters = dict(context.block.named_parameters())
    names = {context.structure.linear(name).weight: linear for name, linear in quantized.items()}
    try:
        for weight, linear in names.items():
            parameters[weight].data = linear.restored
        with _inputs_rounded(context, names):
            yield
    finally:
        for weight in names:
            parameters[weight].data = context.parameters[weight]


def _inputs_rounded(context: BlockContext, by_weight: Mapping[str, QuantizedLinear]) -> LinearWatch | nullcontext[None]:
    if context.recipe.activations == "none":
        return nullcontext()

    def before(name: str, inputs: Tensor) -> Tensor:
        scale = by_weight[name].channel_scale
        return round_tokens(inputs / scale) * scale

    return LinearWatch({weight: linear.restored for weight, linear in by_weight.items()}, before=before)


def advance(context: BlockContext, rows: HiddenStates, quantized: Mapping[str, QuantizedLinear]) -> None:
    """Move rows of the quantized stream on to the output of the block as it was quantized."""
    with torch.no_grad(), weights_replaced(context, quantized):
        for part, hidden, call, _ in rows.batches(context.index):
            rows.write(part, run_block(context.block, hidden, call))
