"""One block as it was quantized, differentiable in what tuning moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from awqkit.methods.tuning import TunableGain, TunableLinear
from awqkit.model.block_calls import BlockCall, Handed, hand_on
from awqkit.model.matrices import matrix_of, stack_and_index
from awqkit.model.observe import LinearWatch
from awqkit.model.structure import LinearView


@dataclass(frozen=True, slots=True)
class TunableBlock:
    """One block as it was quantized, with what may still move.

    module: the block, whose own parameters are not looked at. views, linears: by the name of the weight. gains: by
    parameter name. fixed: every other parameter and buffer by name, as stored; a matrix of a stack by its own.
    """

    module: nn.Module
    views: Mapping[str, LinearView]
    linears: Mapping[str, TunableLinear]
    gains: Mapping[str, TunableGain]
    fixed: Mapping[str, Tensor]

    def __call__(self, hidden: Tensor, call: BlockCall, *, recompute: bool = False) -> Handed:
        """What the block gives, differentiable in `hidden`, scales and gains; recompute: nothing kept for that."""
        if recompute:
            return checkpoint(self._run, hidden, call, use_reentrant=False)
        return self._run(hidden, call)

    def _run(self, hidden: Tensor, call: BlockCall) -> Handed:
        weights = _stacked({name: linear.weight() for name, linear in self.linears.items()}, self.fixed)
        tensors = {**self.fixed, **weights, **{name: gain.vector() for name, gain in self.gains.items()}}
        watched = {
            name: self.views[name].oriented(matrix_of(weights, name))
            for name, linear in self.linears.items()
            if linear.per_row
        }

        def scaled(name: str, outputs: Tensor) -> Tensor:
            bias = self.views[name].bias
            return self.linears[name].scaled(outputs, None if bias is None else tensors[bias])

        def module(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.module, tensors, args, kwargs)

        with LinearWatch(watched, after=scaled):
            return hand_on(module, hidden, call)

    def hold_weights(self) -> None:
        """Make weights that no step changes once for all steps, where there is room for those of all blocks."""
        for linear in self.linears.values():
            linear.hold()

    @property
    def leaves(self) -> list[Tensor]:
        """Everything that a gradient step moves."""
        return [each.log_change for each in (*self.linears.values(), *self.gains.values())]


def _stacked(weights: Mapping[str, Tensor], fixed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that weights are or lie in; `fixed` has the matrices of a stack that are not among them."""
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, weight in {**fixed, **weights}.items():
        found = stack_and_index(name)
        if found is not None:
            stacks.setdefault(found[0], {})[found[1]] = weight
    whole = {name: weight for name, weight in weights.items() if stack_and_index(name) is None}
    return whole | {name: torch.stack([parts[index] for index in range(len(parts))]) for name, parts in stacks.items()}


def kept_bytes(block: TunableBlock, hidden: Tensor, call: BlockCall) -> int:
    """What a block keeps for its gradients when it runs on `hidden` without `recompute`."""
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> None:  # giving the tensor back would tie its graph into a knot that is never freed
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda nothing: nothing):
        block(hidden, call)
    return sum(storage.nbytes() for storage in kept.values())
