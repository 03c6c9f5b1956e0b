"""How a model calls its blocks: recorded from its own forward, and checked to be one block after the other.

Recorders stand in the blocks' places. Each hands on a copy of what it got, and the next must get that copy: then, and
only then, may the blocks be run one by one on each other's outputs. What a block gives beside its hidden states is
handed on as a marker; where the next block gets it, so it will when the blocks are run. The first time they hand on
something else as well: other arguments than these must not come of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from awqkit.errors import ModelError
from awqkit.model.block_calls import BlockCall, BlockInputs, Wanted, leaves, rows_first
from awqkit.model.named_blocks import NamedBlocks


@dataclass(frozen=True, slots=True)
class Beside:
    """Stands for what a block gives beside its hidden states, at a position of its answer."""

    block: int
    position: int


Answer = Callable[[Tensor, int], Any]

# How a block, by its number, gives its hidden states back, the plainest first: what the model accepts is taken.
_ANSWERS: tuple[Answer, ...] = (
    lambda hidden, block: hidden,
    lambda hidden, block: (hidden,),
    lambda hidden, block: (hidden, Beside(block, 1)),
    lambda hidden, block: (hidden, None),
    lambda hidden, block: (hidden, Beside(block, 1), Beside(block, 2)),
    lambda hidden, block: (hidden, None, None),
)


@dataclass(frozen=True, slots=True)
class Manner:
    """How the model calls its blocks.

    answer: how it wants them to. ahead: how many dimensions are before rows and tokens. visited: which of them it calls
    with token ids alone.
    """

    answer: Answer
    ahead: int
    visited: tuple[int, ...]


# What a model raises that is not called as it wants to be.
_FAILURES = (NotImplementedError, TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError)


_ASTRAY = (
    "{where}: block {block} gets what blocks before it gave in a way that cannot be followed, not only the hidden "
    "states or what else block {before} gives: cannot stream it"
)


class _NotHandedOn(ModelError):
    """What a block gives goes where it cannot follow: no other answer would be the model's own."""


def record_calls(
    decoder: Callable[..., Any], blocks: NamedBlocks, ids: Tensor, mask: Tensor | None, manner: Manner | None
) -> tuple[BlockInputs, Manner]:
    """What `decoder` calls its `blocks` with for the token ids `[rows, tokens]`, and in which manner.

    One call for each block that is visited. manner: what was found before, or None to find it. Raises ModelError where
    blocks are called more than once, not in order, on something else than what the one before gives, or not the ones as
    before.
    """
    record, where = partial(_recorded, decoder, blocks, ids, mask), blocks.where
    again, others = [], None
    if manner is not None:
        inputs = record(manner.answer, manner.ahead, again)
    else:
        inputs, manner = _found_by_trying(record)
        others = record(manner.answer, manner.ahead, again, lambda hidden: 0.5 - hidden)
    if tuple(again) != manner.visited:
        raise ModelError(f"the model does not visit the same blocks of {where} each time: cannot stream it")
    if others is not None:
        _refuse_unlike(inputs.calls, others.calls, manner.visited, where)
    return inputs, manner


def _found_by_trying(record: Callable[..., BlockInputs]) -> tuple[BlockInputs, Manner]:
    """The calls by the plainest answer that the model takes; raises what stopped the one that got furthest."""
    furthest, told = -1, None
    for answer in _ANSWERS:
        visited: list[int] = []
        try:
            inputs = record(answer, None, visited)
        except _NotHandedOn:
            raise
        except ModelError as error:
            if len(visited) > furthest:
                furthest, told = len(visited), error
            continue
        return inputs, Manner(answer, inputs.calls[0].ahead, tuple(visited))
    assert told is not None
    raise told


def _refuse_unlike(calls: Sequence[BlockCall], others: Sequence[BlockCall], visited: Sequence[int], where: str) -> None:
    """Raises ModelError where blocks get other arguments when the ones before give other hidden states."""
    for position, (call, other) in enumerate(zip(calls[1:], others[1:], strict=True), start=1):
        found, expected = (leaves([each.args, dict(each.kwargs)]) for each in (call, other))
        if len(found) != len(expected) or not all(map(_same, found, expected)):
            before = visited[position - 1]
            raise _NotHandedOn(_ASTRAY.format(where=where, block=visited[position], before=before))


def _recorded(
    decoder: Callable[..., Any],
    blocks: NamedBlocks,
    ids: Tensor,
    mask: Tensor | None,
    answer: Answer,
    ahead: int | None,
    visited: list[int],
    give: Callable[[Tensor], Tensor] = Tensor.clone,
) -> BlockInputs:
    """The calls when blocks give such an answer; the numbers of those called are added to `visited`.

    give: what a block makes of the hidden states that it gets.
    """
    where = blocks.where
    hidden: list[Tensor] = []
    calls: list[BlockCall] = []
    handed: list[Tensor] = []  # what the block before gave

    def record(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            before = visited[-1] if visited else -1
            if index <= before:
                raise ModelError(f"block {index} of {where} was called out of order: cannot stream it")
            inputs, rest, kwargs = _split_hidden(args, kwargs, f"block {index} of {where}")
            if not visited:
                hidden.append(rows_first(inputs, _ahead(inputs, ids, where, ahead)))
            elif not _same(inputs, handed[0]):
                raise ModelError(
                    f"{where}: block {index} reads something else than what block {before} gives, "
                    "so the model computes between its blocks: cannot stream it"
                )
            calls.append(BlockCall(rest, kwargs, _wanted(rest, kwargs, index, before, where)))
            visited.append(index)
            handed[:] = [give(inputs)]
            return answer(handed[0], index)

        return forward

    keywords = {} if mask is None else {"attention_mask": mask.to(torch.int64)}
    try:
        with torch.no_grad(), blocks_replaced(blocks, record):
            decoder(input_ids=ids, use_cache=False, **keywords)
    except _FAILURES as error:
        if len(calls) != len(blocks):
            raise ModelError(f"the model's forward could not be followed through its blocks: {error}") from error
    if not calls:
        raise ModelError(f"the model visited none of its {len(blocks)} blocks in {where}: cannot quantize them")
    laid = _ahead(handed[0], ids, where, ahead)
    calls = [replace(call, wanted=(*call.wanted, *_written_to(calls)), ahead=laid) for call in calls]
    nexts = [*(call.asks for call in calls[1:]), ()]
    hands = [replace(call, hands=asks) for call, asks in zip(calls, nexts, strict=True)]
    return BlockInputs(hidden[0].detach(), tuple(hands))


def lists_called(decoder: Callable[..., Any], lists: Sequence[NamedBlocks], ids: Tensor) -> set[str]:
    """Which of the lists, by where they are, `decoder` calls modules of for token ids `[rows, tokens]`.

    None if it cannot run.
    """
    for answer in _ANSWERS:
        called: set[str] = set()

        def note(name: str, index: int, answer: Answer = answer, called: set[str] = called) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                called.add(name)
                return answer(_split_hidden(args, kwargs, name)[0].clone(), index)

            return forward

        with torch.no_grad(), ExitStack() as stack:
            for blocks in lists:
                stack.enter_context(blocks_replaced(blocks, partial(note, blocks.where)))
            with suppress(*_FAILURES, ModelError):
                decoder(input_ids=ids, use_cache=False)
                return called
    return set()


def _ahead(inputs: Tensor, ids: Tensor, where: str, known: int | None) -> int:
    """How many dimensions the hidden states have before rows and tokens. known: as it was found before."""
    found = [first for first in range(inputs.dim() - 2) if inputs.shape[first : first + 2] == ids.shape]
    if not found or known not in (None, *found):
        raise ModelError(
            f"{where}: the first block gets hidden states of shape {list(inputs.shape)} for "
            f"{len(ids)} rows of {ids.shape[1]} tokens, expected these two side by side: cannot stream it"
        )
    return found[0] if known is None else known


def _wanted(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], index: int, before: int, where: str
) -> tuple[Wanted, ...]:
    """The arguments that are what the block before gives. Raises _NotHandedOn where they are an earlier one's."""
    found = []
    for place, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, Beside) and value.block == before:
            found.append(Wanted(place, value.position))
        elif _holds_marker(value):
            raise _NotHandedOn(_ASTRAY.format(where=where, block=index, before=before))
    return tuple(found)


def _holds_marker(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_marker, value.values()))
    if isinstance(value, (tuple, list)):
        return any(map(_holds_marker, value))
    return isinstance(value, Beside)


def _written_to(calls: Sequence[BlockCall]) -> tuple[Wanted, ...]:
    """Mappings, one and the same in all calls and still empty, by which blocks hand things on."""
    first, *others = calls

    def at(call: BlockCall, place: int | str) -> Any:
        return call.kwargs.get(place) if isinstance(place, str) else dict(enumerate(call.args)).get(place)

    places = [
        place
        for place, value in (*enumerate(first.args), *first.kwargs.items())
        if isinstance(value, MutableMapping) and not value and all(at(call, place) is value for call in others)
    ]
    return tuple(Wanted(place, -1 - number) for number, place in enumerate(places))


@contextmanager
def blocks_replaced(blocks: NamedBlocks, forward_of: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Inside, the model calls `forward_of(index)` in the place of each block."""
    originals = list(blocks)
    blocks.put([_Recorder(block, forward_of(index)) for index, block in enumerate(originals)])
    try:
        yield
    finally:
        blocks.put(originals)


class _Recorder(nn.Module):
    """Stands in a block's place; other attributes (an attention type, say) are those of the block."""

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)
        object.__setattr__(self, "forward", forward)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_block"), name)


def _same(found: Any, expected: Tensor) -> bool:
    """Equal number by number; NaN is equal to NaN, a damaged checkpoint is found elsewhere."""
    if found is expected:
        return True
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    return torch.allclose(found, expected, rtol=0.0, atol=0.0, equal_nan=True)


def _split_hidden(args: tuple, kwargs: dict[str, Any], block: str) -> tuple[Tensor, tuple, dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    if "hidden_states" not in rest:
        raise ModelError(
            f"{block} is called with keywords only ({', '.join(rest) or 'none'}): which of them is the hidden states "
            "is not clear, they must come first and without a name: cannot stream it"
        )
    return rest.pop("hidden_states"), (), rest
