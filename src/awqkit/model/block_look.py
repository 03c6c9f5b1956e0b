"""One look at a block computing: what every linear reads, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from awqkit.model.block_calls import Handed, leaves
from awqkit.model.observe import TRANSPOSED, LinearWatch, both_ways
from awqkit.model.routing import ChosenExperts, spread
from awqkit.model.structure import LinearView

RunBlock = Callable[[], Tensor | Handed]


@dataclass(slots=True)
class Look:
    """One run of the block: every linear's inputs in order of the calls, and the block's output."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    repeated: set[str] = field(default_factory=set)
    output: Handed | None = None


def look_at(
    block: nn.Module,
    run: RunBlock,
    weights: Mapping[str, Tensor],
    gain: tuple[str, Tensor] | None = None,
    undo: Mapping[str, Tensor] | None = None,
) -> Look:
    """Run the block once. `gain` multiplies a linear's outputs, `undo` the inputs of linears, by weight name."""
    look = Look()

    def before(name: str, inputs: Tensor) -> Tensor | None:
        if name in look.inputs:
            look.repeated.add(name)
        else:
            look.order.append(name)
        look.inputs[name] = inputs  # kept alive, so that no later tensor can be mistaken for it by its address
        return inputs * undo[name] if undo and name in undo else None

    def after(name: str, outputs: Tensor) -> Tensor | None:
        return outputs * gain[1] if gain is not None and name == gain[0] else None

    with torch.no_grad(), LinearWatch(both_ways(weights), before, after):
        look.output = handed(run())
    return look


def call_name(view: LinearView) -> str:
    """The name by which a look at the block knows a linear's weight."""
    return view.weight + TRANSPOSED if view.transposed else view.weight


def every_expert(run: RunBlock, experts: Sequence[int]) -> RunBlock:
    """The same run with its tokens sent to all experts in turn, where there are any. experts: how many there may be."""

    def spread_run() -> Tensor | Handed:
        with ChosenExperts(experts, spread):
            return run()

    return spread_run if experts else run


def numbers_of_experts(block: nn.Module) -> tuple[int, ...]:
    """How many matrices each stack of the block holds, and how many modules each list; convolutions are no stacks."""
    stacks = {value.shape[0] for value in block.parameters() if value.dim() == 3 and min(value.shape[1:]) > 1}
    lists = {len(module) for module in block.modules() if isinstance(module, nn.ModuleList) and len(module) > 1}
    return tuple(sorted(stacks | lists))


def handed(given: Tensor | Handed) -> Handed:
    """What a run gave, with what it hands on."""
    return given if isinstance(given, Handed) else Handed(given)


def relative_change(changed: Handed | None, plain: Handed | None, hidden: Tensor) -> float:
    """The largest change of any row, relative to what the block adds to that row; inf where it is not a number.

    Of what is handed on beside, relative to its own size; inf where whole numbers are others.
    """
    assert changed is not None and plain is not None
    changes = [_largest(changed.hidden - plain.hidden, plain.hidden - hidden)]
    for after, before in zip(leaves(changed.beside), leaves(plain.beside), strict=True):
        if before.is_floating_point() and after.shape == before.shape:
            changes.append(_largest(after - before, before))
        elif not torch.equal(after, before):
            return float("inf")
    return max(change if change == change else float("inf") for change in changes)


def _largest(change: Tensor, like: Tensor) -> float:
    """The largest change of any row, relative to the largest number of `like` there."""
    size = like.abs().flatten(1).amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    return float((change.abs().flatten(1).amax(dim=1) / size).max())
