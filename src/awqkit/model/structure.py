"""What a block turned out to be: its linears, who reads which input, and where a channel scale can be absorbed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LinearView:
    """One `[out, in]` weight of a block, by its path inside the block.

    name: module path in the block (`self_attn.q_proj`). weight: name of its weight parameter. bias: of its bias, or
    None. shape: `(out, in)`. transposed: whether the parameter is `[in, out]`, as GPT-2's are.
    """

    name: str
    weight: str
    bias: str | None
    shape: tuple[int, int]
    transposed: bool = False

    def oriented(self, matrix: Tensor) -> Tensor:
        """The parameter as `[out, in]`, and what is `[out, in]` as the parameter: a view."""
        return matrix.t() if self.transposed else matrix


@dataclass(frozen=True, slots=True)
class LinearInput:
    """One tensor that the listed linears read. `first` is the reader that is called first, where it is observed."""

    first: str
    readers: tuple[str, ...]
    num_channels: int


@dataclass(frozen=True, slots=True)
class Fold:
    """One place where s can be absorbed exactly: producer channel ÷ s, consumers' columns × s.

    kind: "norm" (a vector that multiplies), "offset norm" (a vector w that multiplies as 1 + w), "rows" (the output
    rows of a linear). producer: names of the parameters that are divided. offset: which of them is the w of 1 + w.
    producer_linear: the linear of kind "rows". consumers: linears by name. channel_of: consumer -> `[in]` int64, the
    producer channel of each input channel, −1 where s must stay 1.
    """

    kind: str
    producer: tuple[str, ...]
    offset: str | None
    producer_linear: str | None
    num_channels: int
    consumers: tuple[str, ...]
    channel_of: Mapping[str, Tensor]

    @property
    def read(self) -> Tensor:
        """Which of the producer's channels a consumer reads, bool `[producer channels]`; s is 1 for every other."""
        first = next(iter(self.channel_of.values()))
        found = torch.zeros(self.num_channels, dtype=torch.bool, device=first.device)
        for channel_of in self.channel_of.values():
            found[channel_of[channel_of >= 0]] = True
        return found

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

    def linear(self, name: str) -> LinearView:
        """The linear of that name."""
        return next(view for view in self.linears if view.name == name)

    def why_not_together(self, consumers: Sequence[str]) -> str | None:
        """Why no one s can be searched for these linears, or None: they read different tensors."""
        inputs = {self.input_of(name).first for name in consumers}
        if len(inputs) < 2:
            return None
        return f"its consumers read {len(inputs)} different tensors, one s is searched for one"

    def input_of(self, name: str) -> LinearInput:
        """The input that the linear of that name reads."""
        return next(entry for entry in self.inputs if name in entry.readers)
