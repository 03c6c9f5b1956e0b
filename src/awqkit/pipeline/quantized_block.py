"""A block that computes with quantized weights in the original's units: the folded model's function, unfolded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from awqkit.methods.linear import QuantizedLinear
from awqkit.model.block_calls import run_block
from awqkit.model.observe import LinearWatch
from awqkit.numerics.activations import round_tokens
from awqkit.pipeline.activations import HiddenStates
from awqkit.pipeline.context import BlockContext


@contextmanager
def weights_replaced(context: BlockContext, quantized: Mapping[str, QuantizedLinear]) -> Iterator[None]:
    """Inside, the linears named compute with what their codes mean; for W8A8 their inputs are rounded, too."""
    parameters = dict(context.block.named_parameters())
    views = {name: context.structure.linear(name) for name in quantized}
    try:
        for name, linear in quantized.items():
            parameters[views[name].weight].data = views[name].oriented(linear.restored)
        with _inputs_rounded(context, quantized):
            yield
    finally:
        for view in views.values():
            parameters[view.weight].data = context.parameters[view.weight]


def _inputs_rounded(context: BlockContext, quantized: Mapping[str, QuantizedLinear]) -> LinearWatch | nullcontext[None]:
    if context.recipe.activations == "none":
        return nullcontext()

    def before(name: str, inputs: Tensor) -> Tensor:
        scale = quantized[name].channel_scale
        return round_tokens(inputs / scale) * scale

    return LinearWatch({name: linear.restored for name, linear in quantized.items()}, before=before)


def advance(context: BlockContext, rows: HiddenStates, quantized: Mapping[str, QuantizedLinear]) -> None:
    """Move rows of the quantized stream on to the output of the block as it was quantized."""
    with torch.no_grad(), weights_replaced(context, quantized):
        for part, hidden, call, _ in rows.batches(context.index):
            rows.write(part, run_block(context.block, hidden, call))
