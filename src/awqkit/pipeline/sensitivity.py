"""G of every linear of a block: the block run again with gradients, from the gradient at its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from awqkit.model.block_calls import hand_on
from awqkit.model.observe import LinearWatch
from awqkit.numerics.statistics import Gram, accumulate_gram_, empty_gram, mirrored_, second_moment
from awqkit.pipeline.activations import HiddenStates
from awqkit.pipeline.context import BlockContext
from awqkit.pipeline.end_gradients import backward_from
from awqkit.pipeline.row_parts import by_part
from awqkit.pipeline.summed_statistics import summed_grams


def measure_sensitivity(
    context: BlockContext,
    rows: HiddenStates,
    end_gradient: Tensor,
    beside: Callable[[slice], Sequence[Tensor]] = lambda part: (),
) -> dict[str, Tensor]:
    """For every linear G = E[g gᵀ], `[out, out]` float32; the identity where nothing is felt of it. The rows stay.

    end_gradient: `[rows, tokens, width]`, of the end loss at the block's output. beside(part): of the float tensors
    that the block hands on beside that, for some rows.
    """
    outputs: dict[str, Tensor] = {}

    def after(name: str, output: Tensor) -> None:
        if output.requires_grad:
            output.retain_grad()
            outputs[name] = output

    views = context.structure.linears
    watched = {view.weight: context.weight(view.name) for view in views}

    def of_parts() -> Iterator[dict[str, Gram]]:
        for batches in by_part(rows.batches(context.index), rows.own.ends):
            found = {view.name: empty_gram(view.shape[0], context.device) for view in views}
            for part, hidden, call, mask in batches:
                outputs.clear()
                with torch.enable_grad(), LinearWatch(watched, after=after):
                    handed = hand_on(context.block, hidden.clone().requires_grad_(True), call)
                backward_from(handed, end_gradient[part].to(hidden.device, hidden.dtype), beside(part))
                for view in views:
                    if view.weight in outputs and outputs[view.weight].grad is not None:
                        found[view.name] = accumulate_gram_(found[view.name], outputs[view.weight].grad, mask)
            yield found
            del found  # not beside the next

    reserved = float(rows.tokens_per_batch * context.memory.token)
    found = summed_grams(context.ranks, of_parts(), len(rows.own.ends), reserved)
    grams = {name: second_moment(mirrored_(summed)) for name, summed in found.items()}
    return {
        name: gram if bool(gram.any()) else torch.eye(len(gram), device=gram.device) for name, gram in grams.items()
    }
