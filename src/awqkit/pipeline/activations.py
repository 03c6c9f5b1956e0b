"""Hidden states of the calibration rows between two blocks, and the arguments that go with each batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from awqkit.model.block_calls import BlockCall, Carried, mapped, sharing
from awqkit.model.skeleton import Skeleton
from awqkit.pipeline.free_memory import can_pin, is_spare
from awqkit.pipeline.kept_states import KeptBeside
from awqkit.pipeline.marked_states import MarkedStates
from awqkit.pipeline.row_parts import OwnRows
from awqkit.pipeline.saved_states import rows_of_pieces

_TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 32768}
_DEVICE_SHARE = 0.3  # of the free device memory that hidden states may take before they live on the host


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Token ids `[rows, tokens]` int64 and, where rows were padded, a bool mask of the same shape (True = real).

    weights: `[rows, tokens]` float32, what each token counts in statistics, or None where all count 1.
    """

    ids: Tensor
    mask: Tensor | None = None
    weights: Tensor | None = None

    def rows(self, part: slice) -> TokenRows:
        """The rows of a slice."""
        mask, weights = (None if each is None else each[part] for each in (self.mask, self.weights))
        return TokenRows(self.ids[part], mask, weights)

    def weighing(self, weight: float) -> TokenRows:
        """The same rows, each token counting `weight`."""
        return replace(self, weights=None if weight == 1 else torch.full(self.ids.shape, float(weight)))

    def joined(self, other: TokenRows) -> TokenRows:
        """These rows and then the other's, of the same length."""
        both, mask, weights = (self, other), None, None
        if self.mask is not None or other.mask is not None:
            masks = [torch.ones_like(rows.ids, dtype=torch.bool) if rows.mask is None else rows.mask for rows in both]
            mask = torch.cat(masks)
        if self.weights is not None or other.weights is not None:
            weights = torch.cat([torch.ones(rows.ids.shape) if rows.weights is None else rows.weights for rows in both])
        return TokenRows(torch.cat([self.ids, other.ids]), mask, weights)


class HiddenStates:
    """What the next block reads: `[rows, tokens, width]` float32, visited batch by batch and overwritten in place.

    A model with several residual streams has a dimension more. What blocks hand on beside them goes with them.
    tokens_per_batch: how many tokens a batch holds at most (one row at least); None for as many as suit the device.
    num_streams: about how many of this size there will be; together they leave the device room for the work itself,
    `reserved` bytes at least.
    own: which of all rows these are, where there are several ranks or parts; no batch has rows of two parts.
    only: of so many batches, by number, those that will be asked for; None for all.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        rows: TokenRows,
        device: torch.device,
        *,
        tokens_per_batch: int | None = None,
        num_streams: int = 1,
        reserved: float = 0.0,
        own: OwnRows | None = None,
        only: Callable[[int], Collection[int]] | None = None,
    ) -> None:
        self._device, self._mask, self._rows = device, rows.mask, rows
        self.own = own or OwnRows.undivided(len(rows.ids))
        self._tokens_per_batch = tokens_per_batch or usual_tokens_per_batch(device)
        self._batches = list(_batches(rows.ids.shape, self._tokens_per_batch, self.own.ends))
        self._mark: MarkedStates | None = None
        self._calls: dict[int, tuple[BlockCall, ...]] = {}  # by the first row of a batch
        self._beside: dict[int, tuple[Carried, ...]] = {}
        self._states: Tensor | None = None if self._batches else torch.empty(0, rows.ids.shape[1], 1)
        asked = self._batches if only is None else [self._batches[each] for each in sorted(only(self.num_batches))]
        for part, started in zip(asked, skeleton.start(_split(rows, asked), device), strict=True):
            if self._states is None:
                self._states = _place(rows.ids.shape, started.hidden.shape[2:], device, num_streams, reserved)
            self._states[part].copy_(started.hidden)
            self._calls[part.start] = self._sharing(started.calls)

    def copy(self) -> HiddenStates:
        """The same rows as a stream of its own."""
        twin = object.__new__(HiddenStates)
        twin.__dict__.update(self.__dict__)
        twin._states, twin._beside, twin._mark = self._states.clone(), dict(self._beside), None
        return twin

    def copy_on_host(self) -> HiddenStates:
        """The same rows where they are now, kept on the host until they are asked for batch by batch."""
        twin = object.__new__(HiddenStates)
        twin.__dict__.update(self.__dict__)
        twin._states, twin._beside, twin._mark = self._states.to("cpu", copy=True), dict(self._beside), None
        return twin

    def take(self, other: HiddenStates) -> None:
        """Be where another stream of the same rows is, which is not used afterwards."""
        self._states, self._beside = other._states, other._beside

    @property
    def shape(self) -> torch.Size:
        """Rows, tokens, width."""
        return self._states.shape

    def _sharing(self, calls: tuple[BlockCall, ...]) -> tuple[BlockCall, ...]:
        """The calls with the tensors that the first batch gets as well; those of its own lie with the rows."""
        if not self._calls:
            return calls
        first = next(iter(self._calls.values()))
        own = self._states.device
        return sharing(calls, first, lambda tensor: tensor.to(own))

    def _call(self, call: BlockCall) -> BlockCall:
        return call.changed(lambda tensor: tensor.to(self._device))

    def batches(self, block: int) -> Iterable[tuple[slice, Tensor, BlockCall, Tensor | None]]:
        """Row slice, hidden states on the device, the block's arguments and the mask, batch by batch."""
        for part in self._batches:
            mask = None if self._mask is None else self._mask[part].to(self._device)
            call = self._calls[part.start][block].given(self.beside(part))
            yield part, self._states[part].to(self._device), self._call(call), mask

    def held(self) -> tuple[Tensor, list[tuple[int, tuple[Carried, ...]]]]:
        """The hidden states, and what goes with them, each with the number of its first row among all rows."""
        first = self.own.rows.start
        return self._states, [(first + start, beside) for start, beside in self._beside.items()]

    def put(self, hidden: Tensor, pieces: Sequence[tuple[int, tuple[Carried, ...]]]) -> None:
        """Be where `held` was called, however the rows were cut there; hidden: these rows', pieces: of all rows."""
        if self._batches:
            self._states.copy_(hidden)
        own, first = self._states.device, self.own.rows.start
        for part in self._batches if pieces else ():
            found = rows_of_pieces(pieces, slice(first + part.start, first + part.stop))
            self._beside[part.start] = mapped(found, lambda tensor: tensor.to(own))

    def standing_in(self, hidden: Tensor, own: OwnRows) -> HiddenStates:
        """A stream that only `rows_of` is asked of: these hidden states of other rows of the same kind."""
        twin = object.__new__(HiddenStates)
        twin.__dict__.update(self.__dict__)
        twin._states, twin._beside, twin.own, twin._batches = hidden, {}, own, []
        return twin

    @property
    def device(self) -> torch.device:
        """Where batches are handed out."""
        return self._device

    @property
    def tokens_per_batch(self) -> int:
        """How many tokens the largest batch holds."""
        return max((part.stop - part.start for part in self._batches), default=0) * self._rows.ids.shape[1]

    @property
    def num_batches(self) -> int:
        """How many batches there are."""
        return len(self._batches)

    def batch(self, position: int) -> tuple[slice, Tensor, tuple[BlockCall, ...], Tensor | None]:
        """Row slice, hidden states on the device, the arguments of all blocks, and the mask of one batch.

        Nothing stands yet for what a block gets from the one before.
        """
        part = self._batches[position]
        mask = None if self._mask is None else self._mask[part].to(self._device)
        return part, self._states[part].to(self._device), tuple(map(self._call, self._calls[part.start])), mask

    def beside(self, part: slice) -> tuple[Carried, ...]:
        """What goes with the hidden states of a batch."""
        return self._beside.get(part.start, ())

    def rows_of(self, part: slice) -> Tensor:
        """The hidden states of some rows, on the device."""
        return self._states[part].to(self._device)

    def mark(self) -> None:
        """From here on what is overwritten is kept on the host, so that `put_back` can undo it."""
        if self._mark is None:
            self._mark = MarkedStates(self._states, self._beside, self._device)
        else:
            self._mark.again(self._states, self._beside)

    def put_back(self) -> None:
        """Be where `mark` was called last."""
        if self._mark is not None:
            self._states, self._beside = self._mark.put_back()

    @property
    def is_row_by_row(self) -> bool:
        """Whether a batch is one row, so that it cannot be made smaller."""
        return all(part.stop - part.start == 1 for part in self._batches)

    def halve_batches(self, skeleton: Skeleton) -> None:
        """The same rows in batches of half as many tokens, one row at least. No block has its weights meanwhile."""
        together = KeptBeside(len(self._rows.ids), self._device)
        for part in self._batches if self._beside else ():
            together.keep(part, self.beside(part))
        self._tokens_per_batch = max(1, self._tokens_per_batch // 2)
        self._batches = list(_batches(self._rows.ids.shape, self._tokens_per_batch, self.own.ends))
        self._calls = {}
        batches = _split(self._rows, self._batches)
        for part, started in zip(self._batches, skeleton.start(batches, self._device), strict=True):
            self._calls[part.start] = self._sharing(started.calls)
        if self._beside:
            self._beside = {
                part.start: mapped(together.at(part), lambda tensor: tensor.clone().to(self._states.device))
                for part in self._batches
            }

    def write(self, part: slice, hidden: Tensor, beside: tuple[Carried, ...] = ()) -> None:
        """Put the block's output in the place of its input; beside: what the next block gets with it."""
        if self._mark is not None:
            self._mark.before_write(self._states, part)
        self._states[part].copy_(hidden)
        self._beside[part.start] = mapped(beside, lambda tensor: tensor.detach().to(self._states.device))


def usual_tokens_per_batch(device: torch.device) -> int:
    """How many tokens suit the device where only a block's own weights are in memory beside them."""
    return _TOKENS_PER_BATCH["cuda" if device.type == "cuda" else "cpu"]


def _split(rows: TokenRows, parts: Sequence[slice]) -> Iterator[tuple[Tensor, Tensor | None]]:
    for part in parts:
        batch = rows.rows(part)
        yield batch.ids, batch.mask


def _batches(shape: torch.Size, tokens_per_batch: int, ends: Sequence[int]) -> Iterator[slice]:
    step = max(1, tokens_per_batch // shape[1])
    for first, end in zip((0, *ends), ends, strict=False):
        for start in range(first, end, step):
            yield slice(start, min(start + step, end))


def _place(shape: torch.Size, width: torch.Size, device: torch.device, num_streams: int, reserved: float) -> Tensor:
    size_bytes = shape.numel() * width.numel() * 4 * num_streams
    fits = device.type == "cuda" and is_spare(size_bytes, _DEVICE_SHARE, reserved, device)
    if fits or device.type != "cuda":
        return torch.empty(*shape, *width, device=device)
    return torch.empty(*shape, *width, pin_memory=can_pin(size_bytes, device))
