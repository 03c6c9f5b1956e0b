"""Statistics of a block's inputs as a search asks for them: all of them held, or those of experts chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from awqkit.model.structure import BlockStructure, LinearInput
from awqkit.numerics.statistics import Statistics, in_blocks, pooled

_BEFORE, _AFTER = "observe", "search"  # stages: while a chunk is made, and once it is there


def chunk_numbers(structure: BlockStructure, experts_at_once: int | None) -> dict[str, int]:
    """The chunk of every expert's input, by first reader; none where a block has no more experts than go at once."""
    inputs = [entry for entry in structure.inputs if entry.expert is not None]
    experts = {(entry.expert.experts, entry.expert.index): None for entry in inputs}
    if experts_at_once is None or len(experts) <= experts_at_once:
        return {}
    number = {key: position // experts_at_once for position, key in enumerate(experts)}
    return {entry.first: number[entry.expert.experts, entry.expert.index] for entry in inputs}


@dataclass(frozen=True, slots=True)
class ExpertChunks:
    """Experts' inputs, by first reader, whose statistics are made when they are asked for.

    numbers: of their chunks. tokens: how many met each. together: of the tokens of all experts' like parts. make: the
    statistics of those that are named, by one more run of the block over its rows, in which all ranks take part.
    """

    numbers: Mapping[str, int]
    tokens: Mapping[str, int]
    together: Mapping[str, Statistics]
    make: Callable[[Collection[str]], Mapping[str, Statistics]]

    def in_blocks(self, group_size: int) -> ExpertChunks:
        """With no more of every gram than its blocks of that size."""

        def make(names: Collection[str]) -> Mapping[str, Statistics]:
            return {first: in_blocks(found, group_size) for first, found in self.make(names).items()}

        together = {first: in_blocks(found, group_size) for first, found in self.together.items()}
        return replace(self, together=together, make=make)


class BlockStatistics(Mapping[str, Statistics]):
    """By first reader. With chunks an expert's are here from `bring` on, until another chunk is brought."""

    def __init__(
        self,
        held: Mapping[str, Statistics],
        chunks: ExpertChunks | None = None,
        stage: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._held, self._stage = dict(held), stage
        self._chunks = chunks or ExpertChunks({}, {}, {}, lambda names: {})
        self._brought: Mapping[str, Statistics] = {}
        self._number: int | None = None

    def for_search(self, stage: Callable[[str], None], group_size: int | None) -> BlockStatistics:
        """The same for one recipe's search, which brings chunks of its own. stage: told while one is made.

        group_size: for no more of each gram than its blocks of that size, where they tile it.
        """
        if group_size is None:
            return BlockStatistics(self._held, self._chunks, stage)
        held = {first: in_blocks(found, group_size) for first, found in self._held.items()}
        return BlockStatistics(held, self._chunks.in_blocks(group_size), stage)

    def __getitem__(self, first: str) -> Statistics:
        if first in self._chunks.numbers and not self.has(first):
            raise RuntimeError(f"the statistics of {first} are asked for before its chunk was brought")
        return self._held[first] if first in self._held else self._brought[first]

    def __iter__(self) -> Iterator[str]:
        yield from self._held
        yield from self._chunks.numbers

    def __len__(self) -> int:
        return len(self._held) + len(self._chunks.numbers)

    def has(self, first: str) -> bool:
        """Whether its statistics are here now."""
        return first in self._held or first in self._brought

    def chunk_of(self, entry: LinearInput) -> int | None:
        """The number of an expert's chunk; None for what is held."""
        return self._chunks.numbers.get(entry.first)

    def bring(self, entries: Iterable[LinearInput]) -> None:
        """Have the statistics of these, of one chunk at most; those of another are let go first. All ranks at once."""
        numbers = {self._chunks.numbers[entry.first] for entry in entries if entry.first in self._chunks.numbers}
        if not numbers or numbers == {self._number}:
            return
        (number,) = numbers
        self._brought, self._number = {}, None
        self._stage(_BEFORE)
        self._brought = self._chunks.make([first for first, each in self._chunks.numbers.items() if each == number])
        self._number = number
        self._stage(_AFTER)

    def tokens(self, first: str) -> int:
        """How many tokens an input was seen with."""
        return self._held[first].token_count if first in self._held else self._chunks.tokens[first]

    @cached_property
    def most_tokens(self) -> int:
        """How many tokens the input that most of them met was seen with."""
        return max((self.tokens(first) for first in self), default=0)

    def stand_in(self, first: str) -> Statistics:
        """Its own where they are held, for an expert in a chunk those of all experts together."""
        return self._held[first] if first in self._held else self._chunks.together[first]

    def pooled(self, entries: Iterable[LinearInput]) -> Statistics:
        """Of the tokens of several inputs; experts in chunks count as all of their kind."""
        parts = {id(found): found for found in (self.stand_in(entry.first) for entry in entries)}
        return pooled(list(parts.values()))
