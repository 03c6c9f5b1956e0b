"""Rows in parts that are summed one by one, so that the same sums come out however many ranks share the rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from awqkit.pipeline.ranks import Ranks
from awqkit.recipe import AUTO, Recipe

T = TypeVar("T")
Batch = TypeVar("Batch", bound=tuple[Any, ...])


@dataclass(frozen=True, slots=True)
class OwnRows:
    """The rows of one rank. all_rows: how many there are on all ranks. rows: which are its own, consecutive.

    ends: where each of its parts ends, counted from its own first row.
    """

    all_rows: int
    rows: slice
    ends: tuple[int, ...]

    @classmethod
    def undivided(cls, count: int) -> OwnRows:
        """All rows, in one part."""
        return cls(count, slice(0, count), (count,))


def own_rows(count: int, ranks: Ranks, rank: int | None = None) -> OwnRows:
    """What a rank (this one, if none is given) has of `count` rows, by whole rows and as evenly as that goes."""
    rank, parts = ranks.rank if rank is None else rank, ranks.num_parts
    each = parts // ranks.size
    first, *ends = (count * part // parts for part in range(rank * each, (rank + 1) * each + 1))
    return OwnRows(count, slice(first, ends[-1]), tuple(end - first for end in ends))


def learnt_rows(count: int, ranks: Ranks, recipe: Recipe) -> OwnRows:
    """`own_rows` that statistics are taken of: on a GPU in one part, where a recipe looks at no more than H's groups.

    It is fewer calls. Sums in another order differ in their last bits, which error feedback turns into other codes and
    nearest rounding into next to none.
    """
    own = own_rows(count, ranks)
    return own if recipe.looks_across_groups else _whole_on_gpus(own, ranks)


def compared_rows(count: int, ranks: Ranks, recipe: Recipe) -> OwnRows:
    """`own_rows` that results are compared on: on a GPU in one part, where nothing is learnt from them.

    The order of their sums reaches nothing but the last digits of the errors.
    """
    own = own_rows(count, ranks)
    return own if recipe.propagation == AUTO else _whole_on_gpus(own, ranks)


def _whole_on_gpus(own: OwnRows, ranks: Ranks) -> OwnRows:
    return own if ranks.device.type == "cpu" else replace(own, ends=own.ends[-1:])


def by_part(batches: Iterable[Batch], ends: Sequence[int]) -> Iterator[Iterator[Batch]]:
    """The batches of one part after the other, each to be taken whole; a batch begins with its slice of rows."""
    waiting: deque[Batch] = deque()
    coming = iter(batches)

    def until(end: int | None) -> Iterator[Batch]:
        while True:
            if not waiting:
                batch = next(coming, None)
                if batch is None:
                    return
                waiting.append(batch)
            if end is not None and waiting[0][0].start >= end:
                return
            yield waiting.popleft()

    for end in (*ends[:-1], None):
        yield until(end)


def copies_of_sums(ranks: Ranks, recipe: Recipe) -> int:
    """How many values of one rank `in_pairs` has at a time, with what arrives from other ranks."""
    own_parts = len(learnt_rows(0, ranks, recipe).ends)
    return 1 + (own_parts - 1).bit_length() + (ranks.size > 1)


def in_pairs(
    values: Iterable[T], added: Callable[[T, T], T], wait: Callable[[T], T] | None = None, count: int = 0
) -> T:
    """((v0 + v1) + (v2 + v3)) + …: no more than a few of the values are alive at a time.

    wait: what becomes of a sum while the next value is made; `added` is given it first. count: how many values there
    are, where `wait` is given.
    """
    stack: list[tuple[int, T]] = []
    number = 0
    for value in values:  # not by enumerate, which holds on to it
        number, level = number + 1, 0
        while stack and stack[-1][0] == level:
            value, level = added(stack.pop()[1], value), level + 1
        stack.append((level, value if wait is None or number == count else wait(value)))
        del value  # one on its own may be gigabytes, and the next is made now
    total = stack.pop()[1]
    while stack:
        total = added(stack.pop()[1], total)
    return total
