"""What a block turned out to be: its linears, who reads which input, and where a channel scale can be absorbed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from awqkit.model.matrices import Expert


@dataclass(frozen=True, slots=True)
class LinearView:
    """One `[out, in]` weight of a block, by its path inside the block.

    name: module path in the block (`self_attn.q_proj`). weight: name of its weight, a parameter or a matrix of a
    stack (`model.matrices`). bias: of its bias, or None. shape: `(out, in)`. transposed: whether the weight is
    `[in, out]`, as GPT-2's are. expert: which of several like parts it is that each meet some of the tokens, or None.
    """

    name: str
    weight: str
    bias: str | None
    shape: tuple[int, int]
    transposed: bool = False
    expert: Expert | None = None

    def oriented(self, matrix: Tensor) -> Tensor:
        """The parameter as `[out, in]`, and what is `[out, in]` as the parameter: a view."""
        return matrix.t() if self.transposed else matrix


@dataclass(frozen=True, slots=True)
class LinearInput:
    """One tensor that the listed linears read. `first` is the reader that is called first, where it is observed.

    expert: whose input it is, where that is not every token; inputs of one `expert.part` are picked from one tensor.
    """

    first: str
    readers: tuple[str, ...]
    num_channels: int
    expert: Expert | None = None


@dataclass(frozen=True, slots=True)
class Fold:
    """One place where s can be absorbed exactly: producer channel ÷ s, consumers' columns × s.

    kind: "norm" (a vector that multiplies), "offset norm" (a vector w that multiplies as 1 + w), "rows" (the output
    rows of a linear). producer: names of the parameters that are divided. offset: which of them is the w of 1 + w.
    producer_linear: the linear of kind "rows". consumers: linears by name. channel_of: consumer -> `[in]` int64, the
    producer channel of each input channel, −1 where s must stay 1. read: which of the producer's channels a consumer
    reads, bool `[producer channels]`; s is 1 for every other.
    """

    kind: str
    producer: tuple[str, ...]
    offset: str | None
    producer_linear: str | None
    num_channels: int
    consumers: tuple[str, ...]
    channel_of: Mapping[str, Tensor]
    read: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        first = next(iter(self.channel_of.values()))
        found = torch.zeros(self.num_channels + 1, dtype=torch.bool, device=first.device)
        for channel_of in self.channel_of.values():
            found.index_fill_(0, channel_of % (self.num_channels + 1), True)  # −1 fills a place more
        object.__setattr__(self, "read", found[:-1])

    def why_not_together(self, consumers: Sequence[str]) -> str | None:
        """Why no one s can be searched for these of its consumers, or None: they read its channels in other orders."""
        first, *others = (self.channel_of[name] for name in consumers)
        if all(first is other or torch.equal(first, other) for other in others):
            return None
        return "its consumers read its channels in different orders, one s is searched for one"

    @property
    def label(self) -> str:
        """The producer in a word or two, for people."""
        return self.producer_linear or self.producer[0].removesuffix(".weight")


@dataclass(frozen=True, slots=True)
class Refusal:
    """A producer whose consumers were found but that is not used, and why."""

    label: str
    consumers: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class BlockStructure:
    """Everything that discovery found in one kind of block.

    unwatched: parameters of two and more dimensions that are no linear's weight. experts: how many like parts the
    block's stacks and lists hold, each number once.
    """

    linears: tuple[LinearView, ...]
    inputs: tuple[LinearInput, ...]
    folds: tuple[Fold, ...]
    refusals: tuple[Refusal, ...]
    unwatched: tuple[str, ...]
    experts: tuple[int, ...] = ()
    _views: Mapping[str, LinearView] = field(init=False, repr=False, compare=False)
    _inputs: Mapping[str, int] = field(init=False, repr=False, compare=False)  # linear -> position of what it reads

    def __post_init__(self) -> None:
        object.__setattr__(self, "_views", {view.name: view for view in self.linears})
        inputs = {name: position for position, entry in enumerate(self.inputs) for name in entry.readers}
        object.__setattr__(self, "_inputs", inputs)

    def linear(self, name: str) -> LinearView:
        """The linear of that name."""
        return self._views[name]

    def inputs_of(self, consumers: Sequence[str]) -> tuple[LinearInput, ...]:
        """What these linears read, in order of data flow."""
        return tuple(self.inputs[position] for position in sorted({self._inputs[name] for name in consumers}))

    def inputs_of_experts(self) -> list[tuple[LinearInput, ...]]:
        """The inputs of all experts' like parts together, in order of data flow."""
        alike: dict[tuple[str, str], list[LinearInput]] = {}
        for entry in self.inputs:
            if entry.expert is not None:
                alike.setdefault((entry.expert.experts, entry.expert.part), []).append(entry)
        return [tuple(entries) for entries in alike.values()]

    def input_of(self, name: str) -> LinearInput:
        """The input that the linear of that name reads."""
        return self.inputs[self._inputs[name]]
