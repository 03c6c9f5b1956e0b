"""One block as it was quantized, differentiable in what tuning moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from awqkit.methods.tuning import TunableGain, TunableLinear
from awqkit.model.block_calls import BlockCall
from awqkit.model.observe import LinearWatch


@dataclass(frozen=True, slots=True)
class TunableBlock:
    """One block as it was quantized, with what may still move.

    module: the block, whose own parameters are not looked at. linears, gains: by parameter name. fixed: every other
    parameter and buffer by name, as stored.
    """

    module: nn.Module
    linears: Mapping[str, TunableLinear]
    gains: Mapping[str, TunableGain]
    fixed: Mapping[str, Tensor]

    def __call__(self, hidden: Tensor, call: BlockCall, *, recompute: bool = False) -> Tensor:
        """The block's output, differentiable in `hidden`, scales and gains; recompute: nothing kept for that."""
        if recompute:
            return checkpoint(self._run, hidden, call, use_reentrant=False)
        return self._run(hidden, call)

    def _run(self, hidden: Tensor, call: BlockCall) -> Tensor:
        weights = {name: linear.weight() for name, linear in self.linears.items()}
        tensors = {**self.fixed, **weights, **{name: gain.vector() for name, gain in self.gains.items()}}
        watched = {name: linear.view.oriented(weights[name]) for name, linear in self.linears.items() if linear.per_row}

        def scaled(name: str, outputs: Tensor) -> Tensor:
            linear = self.linears[name]
            return linear.scaled(outputs, None if linear.view.bias is None else tensors[linear.view.bias])

        with LinearWatch(watched, after=scaled):
            outputs = functional_call(self.module, tensors, (hidden, *call.args), dict(call.kwargs))
        return outputs[0] if isinstance(outputs, (tuple, list)) else outputs

    @property
    def leaves(self) -> list[Tensor]:
        """Everything that a gradient step moves."""
        return [each.log_change for each in (*self.linears.values(), *self.gains.values())]


def kept_bytes(block: TunableBlock, hidden: Tensor, call: BlockCall) -> int:
    """What a block keeps for its gradients when it runs on `hidden` without `recompute`."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        block(hidden, call)
    return sum(kept.values())
