"""A block that computes with quantized weights in the original's units: the folded model's function, unfolded."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from awqkit.methods.linear import QuantizedLinear, RestoredLinear
from awqkit.model.block_calls import hand_on
from awqkit.model.observe import LinearWatch
from awqkit.numerics.activations import round_tokens
from awqkit.pipeline.activations import HiddenStates
from awqkit.pipeline.context import BlockContext


def weights_replaced(
    context: BlockContext,
    quantized: Mapping[str, QuantizedLinear | RestoredLinear],
    before: Callable[[str, Tensor], None] = lambda name, inputs: None,
) -> LinearWatch:
    """Inside, the linears named compute with what their codes mean; for W8A8 their inputs are rounded, too.

    quantized: looked up as each linear is reached, so it may grow on the way. before(name, inputs): called first.
    """

    def arrive(name: str, inputs: Tensor) -> Tensor | None:
        before(name, inputs)
        if context.recipe.activations == "none" or name not in quantized:
            return None
        scale = quantized[name].channel_scale
        return round_tokens(inputs / scale) * scale

    def weight_of(name: str) -> Tensor | None:
        return quantized[name].restored if name in quantized else None

    weights = {view.name: context.weight(view.name) for view in context.structure.linears}
    return LinearWatch(weights, before=arrive, weight_of=weight_of)


def advance(context: BlockContext, rows: HiddenStates, quantized: Mapping[str, QuantizedLinear]) -> None:
    """Move rows on to the output of the block with these linears quantized."""
    with torch.no_grad(), weights_replaced(context, quantized):
        for part, hidden, call, _ in rows.batches(context.index):
            rows.write(part, *hand_on(context.block, hidden, call))
