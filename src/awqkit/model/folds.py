"""Finding folds by asking the block. No architecture, module or parameter name decides anything.

Multiply a producer's channels by distinct random factors and look at every linear's input. Where channel j of an input
grew by exactly the factor of producer channel c, `channel_of[j] = c`; undo it there and look again, until nothing new
appears. Repeating matters: an uncompensated reader changes everything behind it. `proof.py` proves what is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from awqkit.model.block_look import (
    Look,
    RunBlock,
    call_name,
    every_expert,
    look_at,
    numbers_of_experts,
    relative_change,
)
from awqkit.model.channel_factors import distinct_factors, read_factors, with_one
from awqkit.model.linear_views import linear_inputs, linear_views
from awqkit.model.matrices import matrix_parameters, parameter_of
from awqkit.model.proof import divided
from awqkit.model.structure import BlockStructure, Fold, LinearView, Refusal

_ROUGH_TOLERANCE = 1e-3  # of a change of the output under random factors, relative to the block's own contribution
_MAX_PASSES = 8
_MAX_ROWS_ASKED = 400  # of a fused linear; a hundred heads whose q, k and v lie side by side take about as many

_Ask = Callable[..., "tuple[dict[str, Tensor], Look] | None"]


@dataclass(frozen=True, slots=True)
class _Producer:
    kind: str
    parameters: tuple[str, ...]
    offset: str | None
    linear: LinearView | None
    num_channels: int


def discover(block: nn.Module, run: RunBlock, hidden: Tensor, *, look_for_folds: bool = True) -> BlockStructure:
    """The structure of a block with real weights. `run()` runs it on `hidden` `[rows, tokens, width]` (float32) and
    gives its output, alone or with what it hands on.

    look_for_folds: whether to ask where scales can be absorbed, or for linears and their inputs alone. Parameters
    are changed on the way and restored exactly.
    """
    weights, experts = matrix_parameters(block), numbers_of_experts(block)
    run = every_expert(run, experts)
    plain = look_at(block, run, weights)
    views = linear_views(block, weights, plain, hidden.shape[:2].numel())
    inputs = linear_inputs(plain, views)
    folds: list[Fold] = []
    refusals = []
    for producer in _producers(block, views, plain) if look_for_folds else ():
        ask = partial(_consumers, block, run, weights, views, plain, producer)
        found = ask() or (_of_some_rows(ask, producer) if producer.linear is not None else None)
        if not found:
            continue
        channel_of, look = found
        fold = Fold(
            producer.kind,
            producer.parameters,
            producer.offset,
            producer.linear.name if producer.linear else None,
            producer.num_channels,
            tuple(channel_of),
            channel_of,
        )
        change = relative_change(look.output, plain.output, hidden)
        if change > _ROUGH_TOLERANCE:
            reason = f"something besides the linears it was found in reads it (output changes by {change:.1e})"
            refusals.append(Refusal(fold.label, fold.consumers, reason))
        elif any(fold.label == other.label for other in folds):
            continue
        else:
            folds += _of_every_expert(fold, views)
    called = {parameter_of(view.weight) for view in views}
    others = tuple(name for name, value in block.named_parameters() if value.dim() > 1 and name not in called)
    return BlockStructure(tuple(views), inputs, tuple(folds), tuple(refusals), others, experts)


def _of_every_expert(fold: Fold, views: Sequence[LinearView]) -> list[Fold]:
    """A fold between the matrices of one expert, found in the first, for each of them; any other fold as it is."""
    named = {view.name: view for view in views}
    producer = named.get(fold.producer_linear or "")
    if producer is None or producer.expert is None:
        return [fold]
    inside = [named[name].expert for name in fold.consumers]
    if any(of is None or (of.experts, of.index) != (producer.expert.experts, producer.expert.index) for of in inside):
        return [fold]
    of_expert = {(view.expert.index, view.expert.part): view for view in views if _in(view, producer.expert.experts)}
    parts = {producer.expert.part, *(of.part for of in inside if of)}
    numbers = sorted({number for number, _ in of_expert})
    found = []
    for number in (number for number in numbers if all((number, part) in of_expert for part in parts)):
        rows = of_expert[number, producer.expert.part]
        readers = {of_expert[number, named[name].expert.part].name: of for name, of in fold.channel_of.items()}
        parameters = (rows.weight,) if rows.bias is None else (rows.weight, rows.bias)
        found.append(replace(
            fold, producer=parameters, producer_linear=rows.name, consumers=tuple(readers), channel_of=readers
        ))  # fmt: skip
    return found


def _in(view: LinearView, experts: str) -> bool:
    return view.expert is not None and view.expert.experts == experts


def _producers(block: nn.Module, views: Sequence[LinearView], plain: Look) -> Iterator[_Producer]:
    """Everything whose channels might be scaled: vectors of modules without a matrix, and rows of linears.

    Of the experts the first that was called stands for all.
    """
    linear_owners = {view.name for view in views}
    for path, module in block.named_modules():
        vectors = {leaf: value for leaf, value in module.named_parameters(recurse=False) if value.dim() == 1}
        if not vectors or path in linear_owners or len({value.shape[0] for value in vectors.values()}) != 1:
            continue
        names = tuple(f"{path}.{leaf}" if path else leaf for leaf in vectors)
        size = next(iter(vectors.values())).shape[0]
        yield _Producer("norm", names, None, None, size)
        for name in names:
            yield _Producer("offset norm", names, name, None, size)
    asked: set[tuple[str, str]] = set()
    for view in views:
        if view.expert is not None:
            alike = (view.expert.experts, view.expert.part)
            if alike in asked or call_name(view) not in plain.inputs:
                continue
            asked.add(alike)
        parameters = (view.weight,) if view.bias is None else (view.weight, view.bias)
        yield _Producer("rows", parameters, None, view, view.shape[0])


def _consumers(
    block: nn.Module,
    run: RunBlock,
    weights: Mapping[str, Tensor],
    views: Sequence[LinearView],
    plain: Look,
    producer: _Producer,
    rows: Sequence[int] | None = None,
) -> tuple[dict[str, Tensor], Look] | None:
    """Linears whose input carries the producer's factors, with `channel_of`, and the run with all of them undone.

    rows: the only channels that are scaled, or None for all.
    """
    factor = distinct_factors(producer.num_channels, plain.output.hidden.device)
    if rows is not None:
        scaled = torch.zeros_like(factor, dtype=torch.bool)
        scaled[list(rows)] = True
        factor = torch.where(scaled, factor, torch.ones_like(factor))
    channel_of: dict[str, Tensor] = {}
    undo: dict[str, Tensor] = {}
    gain = (call_name(producer.linear), factor) if producer.linear else None
    with _scaled_vectors(block, producer, factor):
        for _ in range(_MAX_PASSES):
            look = look_at(block, run, weights, gain, undo)
            new = _newly_read(plain, look, [
                view for view in views if view.name not in channel_of and view is not producer.linear
            ], factor)  # fmt: skip
            for view in views:
                if view.name in new:
                    undo[call_name(view)] = 1.0 / with_one(factor)[new[view.name]]
            if not new:
                break
            channel_of |= new
    if not channel_of:
        return None
    if producer.linear is None or producer.linear.expert is None:
        channel_of = _with_siblings(channel_of, views, plain)
    return ({view.name: channel_of[view.name] for view in views if view.name in channel_of}, look)


def _newly_read(plain: Look, look: Look, views: Sequence[LinearView], factor: Tensor) -> dict[str, Tensor]:
    """`channel_of` of the linears among `views` whose input carries the factors."""
    pairs = {
        view.name: (before, after)
        for view in views
        if (before := plain.inputs.get(call_name(view))) is not None
        and (after := look.inputs.get(call_name(view))) is not None
        and before.shape == after.shape
    }
    read = zip(pairs, read_factors(list(pairs.values()), factor), strict=True)
    return {name: mapping for name, mapping in read if mapping is not None}


def _with_siblings(channel_of: dict[str, Tensor], views: Sequence[LinearView], plain: Look) -> dict[str, Tensor]:
    """What was found in an expert holds for those of its siblings that no token met."""
    named = {view.name: view for view in views}
    known = {(of.experts, of.part): mapping for name, mapping in channel_of.items() if (of := named[name].expert)}
    unmet = {
        view.name: known[of.experts, of.part]
        for view in views
        if (of := view.expert) and call_name(view) not in plain.inputs and (of.experts, of.part) in known
    }
    return channel_of | unmet


def _of_some_rows(ask: _Ask, producer: _Producer) -> tuple[dict[str, Tensor], Look] | None:
    """As `_consumers`, of those rows of a fused linear that can be scaled: v's of q, k and v, up's of gate and up.

    Ranges of rows are halved until the first, the middle and the last row of each agree. What a query or a gate is
    scaled by goes through a softmax or an activation and is no factor any more.
    """
    asked: dict[int, bool] = {}

    def alone(row: int) -> bool:
        if row not in asked:
            asked[row] = len(asked) < _MAX_ROWS_ASKED and ask([row]) is not None
        return asked[row]

    rows = _scalable(alone, ask, 0, producer.num_channels)
    return ask(rows) if rows else None


def _scalable(alone: Callable[[int], bool], ask: _Ask, first: int, end: int) -> list[int]:
    """Not inside: a function in its own closure would keep the block's weights until Python's next collection."""
    said = [alone(row) for row in (first, (first + end - 1) // 2, end - 1)]
    if not any(said):
        return []
    if all(said) and ask(range(first, end)) is not None:
        return list(range(first, end))
    if end - first <= 1:
        return []
    middle = (first + end) // 2
    return _scalable(alone, ask, first, middle) + _scalable(alone, ask, middle, end)


class _scaled_vectors:
    """Inside, a norm's vectors are multiplied by the factors; rows of a linear are scaled at the call instead."""

    def __init__(self, block: nn.Module, producer: _Producer, factor: Tensor) -> None:
        self._parameters = dict(block.named_parameters())
        self._producer, self._factor = producer, factor
        self._saved: dict[str, Tensor] = {}

    def __enter__(self) -> None:
        if self._producer.linear is None:
            for name in self._producer.parameters:
                self._saved[name] = self._parameters[name].data
                scaled = divided(self._saved[name], 1.0 / self._factor, name == self._producer.offset)
                self._parameters[name].data = scaled

    def __exit__(self, *_: object) -> None:
        for name, value in self._saved.items():
            self._parameters[name].data = value
