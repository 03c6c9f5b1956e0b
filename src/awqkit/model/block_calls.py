"""How a block is called, what it hands on to the next one, and running it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from awqkit.errors import ModelError

Carried = Any  # what travels with hidden states: a tensor `[rows, ...]`, None, or a tuple, list or dict of such


class Handed(NamedTuple):
    """What a block gives: hidden states `[rows, tokens, width]`, and what the next block gets beside them."""

    hidden: Tensor
    beside: tuple[Carried, ...] = ()


@dataclass(frozen=True, slots=True)
class Wanted:
    """An argument that comes from the block before. place: its number after the hidden states, or its keyword.

    source: its position in that block's answer, from 1; −1 − n for the n-th mapping that all blocks may write to.
    """

    place: int | str
    source: int


@dataclass(frozen=True, slots=True)
class BlockCall:
    """The arguments of one block besides the hidden states, as the model itself passes them.

    wanted: which of them the block before gives. hands: what of its own answer the next block wants, by source.
    ahead: how many dimensions its hidden states have before rows and tokens.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    wanted: tuple[Wanted, ...] = ()
    hands: tuple[int, ...] = ()
    ahead: int = 0

    @property
    def asks(self) -> tuple[int, ...]:
        """What the block wants of the one before, by source."""
        return tuple(sorted({want.source for want in self.wanted}))

    def given(self, beside: tuple[Carried, ...]) -> BlockCall:
        """The call with what the block before handed on, in the order of `asks`; nothing before the first block."""
        if not beside or not self.wanted:
            return self
        values, args, kwargs = dict(zip(self.asks, beside, strict=True)), list(self.args), dict(self.kwargs)
        for want in self.wanted:
            holder = args if isinstance(want.place, int) else kwargs
            value = values[want.source]
            if want.source < 0:
                value = copy.copy(holder[want.place])
                value.update(values[want.source])
            holder[want.place] = value
        return replace(self, args=tuple(args), kwargs=kwargs)

    def changed(self, change: Callable[[Tensor], Tensor]) -> BlockCall:
        """The call with every tensor among its arguments changed."""
        kwargs = {name: mapped(value, change) for name, value in self.kwargs.items()}
        return replace(self, args=tuple(mapped(value, change) for value in self.args), kwargs=kwargs)

    def passes_the_same(self, other: BlockCall) -> bool:
        """Whether both calls pass equal tensors, in equal places among equal numbers, flags and words."""
        own = (self.args, dict(self.kwargs), self.wanted, self.hands, self.ahead)
        return _same(own, (other.args, dict(other.kwargs), other.wanted, other.hands, other.ahead))


@dataclass(frozen=True, slots=True)
class BlockInputs:
    """What a batch of rows turns into before the first block: `hidden` `[rows, tokens, width]`, one call per block."""

    hidden: Tensor
    calls: tuple[BlockCall, ...]


def sharing(
    calls: Sequence[BlockCall], likes: Sequence[BlockCall], otherwise: Callable[[Tensor], Tensor]
) -> tuple[BlockCall, ...]:
    """The calls with the tensors of `likes` in the places of equal ones of their own, and the other ones changed.

    What all blocks of a model are called with is compared, or changed, once.
    """
    chosen: dict[tuple[int, int], Tensor] = {}

    def shared(call: BlockCall, like: BlockCall) -> BlockCall:
        known = iter([*_tensors_of(like), *[None] * len(_tensors_of(call))])

        def share(value: Tensor) -> Tensor:
            other = next(known)
            if other is None:
                return otherwise(value)
            pair = id(value), id(other)
            if pair not in chosen:
                chosen[pair] = other if _equal(value, other) else otherwise(value)
            return chosen[pair]

        return call.changed(share)

    return tuple(map(shared, calls, likes))


def hand_on(block: Callable[..., Any], hidden: Tensor, call: BlockCall) -> Handed:
    """Run a block on `[rows, tokens, width]`.

    Raises ModelError where it hands on what has no rows.
    """
    args, kwargs, written = list(call.args), dict(call.kwargs), {}
    for want in call.wanted:
        if want.source < 0:  # each run writes to a mapping of its own
            holder = args if isinstance(want.place, int) else kwargs
            holder[want.place] = written[want.source] = copy.copy(holder[want.place])
    outputs = block(laid_out(hidden, call.ahead), *args, **kwargs)
    answer = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    beside = tuple(dict(written[source]) if source < 0 else answer[source] for source in call.hands)
    for each in beside:
        _check(each, len(hidden))
    return Handed(rows_first(answer[0], call.ahead), beside)


def run_block(block: Callable[..., Any], hidden: Tensor, call: BlockCall) -> Tensor:
    """The block's output hidden states, `[rows, tokens, width]`."""
    return hand_on(block, hidden, call).hidden


def laid_out(hidden: Tensor, ahead: int) -> Tensor:
    """`[rows, tokens, ...]` as a model has it that keeps `ahead` dimensions before these two."""
    return hidden.movedim((0, 1), (ahead, ahead + 1)).contiguous() if ahead else hidden


def rows_first(hidden: Tensor, ahead: int) -> Tensor:
    """`[rows, tokens, ...]` of what a model has that keeps `ahead` dimensions before these two."""
    return hidden.movedim((ahead, ahead + 1), (0, 1)).contiguous() if ahead else hidden


def mapped(carried: Carried, change: Callable[[Tensor], Tensor]) -> Carried:
    """The same with every tensor changed; what is no tensor and holds none stays as it is."""
    if isinstance(carried, Tensor):
        return change(carried)
    if type(carried) in (tuple, list):
        return type(carried)(mapped(each, change) for each in carried)
    if type(carried) is dict:
        return {key: mapped(each, change) for key, each in carried.items()}
    return carried


def leaves(carried: Carried) -> list[Tensor]:
    """Every tensor of it, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(carried, note)
    return found


def _tensors_of(call: BlockCall) -> list[Tensor]:
    return leaves([call.args, dict(call.kwargs)])


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.to(other.device), other)


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments are one object, or are made of equal tensors and plain values; another kind never is."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return _equal(one, other)
    if type(one) in (tuple, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if type(one) is dict:
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    return isinstance(one, (bool, int, float, str, Wanted)) and one == other


def _check(carried: Carried, rows: int) -> None:
    """Raises ModelError where this cannot travel with its rows."""
    if isinstance(carried, (tuple, list)):
        for each in carried:
            _check(each, rows)
    elif isinstance(carried, dict):
        for each in carried.values():
            _check(each, rows)
    elif isinstance(carried, Tensor):
        if carried.dim() == 0 or len(carried) != rows:
            raise ModelError(
                f"a block hands the next one a tensor of shape {list(carried.shape)} for {rows} rows of hidden states: "
                "cannot stream it"
            )
    elif carried is not None:
        raise ModelError(
            f"a block hands the next one a {type(carried).__name__} beside the hidden states: cannot stream it"
        )
