"""The ranks of one run: the only file that knows `torch.distributed`.

Every rank holds its own calibration rows and computes its own share of a block. What all of them must agree on goes
through here, in the same order on each: sums of statistics, results of shared work, and what the first rank decided.
"""

from __future__ import annotations

import io
import itertools
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from awqkit.errors import AwqkitError, RankLostError, UsageError, gist

S, T = TypeVar("S"), TypeVar("T")

_HOST = torch.device("cpu")
_TREE_PARTS = 4  # parts of the rows wherever 1, 2 or 4 ranks are to add up the same bits
_NO_ANSWER = timedelta(minutes=30)  # from a rank that has not ended; one that has is noticed at once
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.001, 0.2  # seconds between two looks at what the first rank has told
_FIRST_ENDED = "the first rank ended"
_STARTS = itertools.count()


def in_turn(tasks: Iterable[Callable[[], T]]) -> list[T]:
    """What each task returns."""
    return [task() for task in tasks]


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place among `size` that work on one run. One process alone exchanges nothing.

    device: where exchanged tensors are wanted. host: a gloo group, for tensors in host memory. cards: an NCCL group,
    where every rank has a GPU to itself, or None. pairs, card_pairs: groups of two, one for each level of the sum.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = _HOST
    _store: Any = None
    _host: Any = None
    _cards: Any = None
    _pairs: tuple[Any, ...] = ()
    _card_pairs: tuple[Any, ...] = ()
    _told: list[int] = field(default_factory=lambda: [0], compare=False)

    @classmethod
    def alone(cls, device: torch.device = _HOST) -> Ranks:
        """One process, which exchanges nothing."""
        return cls(device=device)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that decides, writes and tells."""
        return self.rank == 0

    @property
    def backend(self) -> str:
        """By what sums and results travel between ranks."""
        return "gloo" if self._cards is None else "NCCL"

    @property
    def num_parts(self) -> int:
        """In how many parts the ranks together sum over the rows: four on 1, 2 and 4 ranks, so that they agree."""
        return _TREE_PARTS if _TREE_PARTS % self.size == 0 else self.size

    @property
    def num_pieces(self) -> int:
        """In how many pieces the rows of a large linear are rounded: on GPUs no more than there are ranks.

        A product of fewer rows may differ in its last bits there, and takes a GPU nearly as long as one of all.
        """
        return self.num_parts if self.device.type == "cpu" else self.size

    def summed(self, *tensors: Tensor) -> list[Tensor]:
        """The sum of each over all ranks, added in pairs, pairs of pairs, and so on; the given may be overwritten."""
        if self.size == 1:
            return list(tensors)
        if self._cards is not None:
            self.meet()  # whoever waits inside NCCL does not notice that a rank is gone
        return [self._sum(tensor) for tensor in tensors]

    def _sum(self, tensor: Tensor) -> Tensor:
        if self._cards is not None and tensor.device.type == "cuda":
            tensor = tensor.contiguous()
            with _lost():
                for group in self._card_pairs or (self._cards,):
                    dist.all_reduce(tensor, group=group)
            return tensor
        here = tensor.cpu().contiguous()
        with _lost():
            for group in self._pairs or (self._host,):
                dist.all_reduce(here, group=group)
        return here.to(tensor.device)

    def largest(self, tensor: Tensor) -> Tensor:
        """The elementwise maximum over all ranks."""
        if self.size == 1:
            return tensor
        here = tensor.cpu().contiguous()
        with _lost():
            dist.all_reduce(here, op=dist.ReduceOp.MAX, group=self._host)
        return here.to(tensor.device)

    def everyones(self, value: T) -> list[T]:
        """What each rank gave, in order of ranks; tensors in it arrive on `device`. Not for hidden states."""
        if self.size == 1:
            return [value]
        by_card = self._cards is not None
        form, data = _packed(value, self.device if by_card else _HOST)
        forms: list[Any] = [None] * self.size
        with _lost():
            dist.all_gather_object(forms, (form, len(data)), group=self._host)
            found = []
            for rank, (shape, num_bytes) in enumerate(forms):
                buffer = data if rank == self.rank else torch.empty(num_bytes, dtype=torch.uint8, device=data.device)
                if num_bytes:
                    dist.broadcast(buffer, src=rank, group=self._cards if by_card else self._host)
                found.append(value if rank == self.rank else _unpacked(shape, buffer, self.device))
        return found

    def spread(
        self,
        tasks: Sequence[Callable[[], S]],
        costs: Sequence[float],
        results_of: Callable[[Iterable[Callable[[], S]]], list[T]] = in_turn,
    ) -> list[T]:
        """The result of every task, each computed by one rank; the costliest are dealt first, to who has least.

        results_of: how a rank computes its own.
        """
        if self.size == 1 or not tasks:
            return results_of(tasks)
        own_tasks = [number for number, owner in enumerate(dealt(costs, self.size)) if owner == self.rank]
        mine = dict(zip(own_tasks, results_of([tasks[number] for number in own_tasks]), strict=True))
        results: dict[int, T] = {}
        for own in self.everyones(mine):
            results |= own
        return [results[number] for number in range(len(tasks))]

    def gathered(self, value: T) -> list[T] | None:
        """On the first rank what each gave, in order of ranks, in host memory; None on the others."""
        if self.size == 1:
            return [value]
        if not self.is_first:
            self._send(value, 0)
            return None
        return [value, *(self._receive(rank) for rank in range(1, self.size))]

    def handed_out(self, of_rank: Callable[[int], T] | None) -> T:
        """What the first rank has for this one. of_rank: asked on the first rank, for each rank in turn."""
        if not self.is_first:
            return self._receive(0)
        assert of_rank is not None
        for rank in range(1, self.size):
            self._send(of_rank(rank), rank)
        return of_rank(0)

    def told(self, value: T | None = None) -> T:
        """The first rank's value, small and without tensors on a GPU; the others wait for it as long as it takes."""
        if self.size == 1:
            return value  # type: ignore[return-value]
        key = f"told {self._told[0]}"
        self._told[0] += 1
        with _lost():
            if self.is_first:
                self._store.set(key, pickle.dumps(value))
                return value  # type: ignore[return-value]
            pause = _SHORTEST_PAUSE
            while not self._store.check([key]):
                if self._store.check([_FIRST_ENDED]):
                    raise RankLostError("the first rank ended, and this one with it")
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            return pickle.loads(self._store.get(key))

    def together(self, work: Callable[[], T]) -> T:
        """What `work` gives here, once every rank has done its own. Where one refuses, the first says so, for all."""
        if self.size == 1:
            return work()
        result, refused = None, None
        try:
            result = work()
        except AwqkitError as error:
            refused = error
        found = self.everyones(None if refused is None else (type(refused), str(refused)))
        told = next(((rank, each) for rank, each in enumerate(found) if each is not None), None)
        if told is None:
            return result  # type: ignore[return-value]
        if refused is not None and self.is_first:
            raise refused
        rank, (kind, text) = told
        raise kind(text if rank == 0 else f"rank {rank}: {text}")

    def meet(self) -> None:
        """Wait until all ranks are here. Raises RankLostError where one is gone."""
        if self.size > 1:
            with _lost():
                dist.barrier(group=self._host)

    def _send(self, value: Any, rank: int) -> None:
        form, data = _packed(value, _HOST)
        head = torch.tensor([len(form), len(data)], dtype=torch.int64)
        with _lost():
            dist.send(head, rank, group=self._host)
            dist.send(torch.frombuffer(bytearray(form), dtype=torch.uint8), rank, group=self._host)
            if len(data):
                dist.send(data, rank, group=self._host)

    def _receive(self, rank: int) -> Any:
        head = torch.zeros(2, dtype=torch.int64)
        with _lost():
            dist.recv(head, rank, group=self._host)
            form, data = (torch.empty(int(size), dtype=torch.uint8) for size in head)
            dist.recv(form, rank, group=self._host)
            if len(data):
                dist.recv(data, rank, group=self._host)
        return _unpacked(form.numpy().tobytes(), data, _HOST)


def asked_size(environment: Mapping[str, str] = os.environ) -> int:
    """How many ranks torchrun started; 1 where it did not."""
    return int(environment.get("WORLD_SIZE", "1")) if "RANK" in environment else 1


def local_rank(environment: Mapping[str, str] = os.environ) -> int:
    """This process's number among those of its machine."""
    return int(environment.get("LOCAL_RANK", "0"))


@contextmanager
def started_ranks(device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun started, connected; one alone where it did not.

    device: this process's own. NCCL connects GPUs where each rank has one to itself, gloo everything else.
    """
    size = asked_size()
    if size == 1:
        yield Ranks.alone(device)
        return
    if dist.is_initialized():
        raise UsageError("torch.distributed is in use in this process already: awqkit connects its ranks itself")
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=_NO_ANSWER)))
    began = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}.{next(_STARTS)}"  # the store may outlive the ranks
    store = dist.PrefixStore(f"awqkit {began}", store)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _lost():
        store.set(f"device {rank}", f"{socket.gethostname()} {device}")
        devices = [store.get(f"device {each}").decode() for each in range(size)]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_NO_ANSWER)
        own_cards = len(set(devices)) == size and all("cuda" in each for each in devices)
        cards = dist.new_group(backend="nccl", timeout=_NO_ANSWER) if own_cards and dist.is_nccl_available() else None
        card_pairs = () if cards is None or size == 2 else _pairs(rank, size, "nccl")
        ranks = Ranks(rank, size, device, store, dist.group.WORLD, cards, _pairs(rank, size, "gloo"), card_pairs)
    try:
        yield ranks
    except BaseException as error:
        with suppress(RuntimeError):
            _say_why(store, ranks, error)
        if cards is None:  # NCCL waits for the others, who may be gone
            dist.destroy_process_group()
        raise
    ranks.meet()
    dist.destroy_process_group()


def _say_why(store: Any, ranks: Ranks, error: BaseException) -> None:
    """Leave for the first rank why this one ended; the first puts what others left into its own error."""
    if not ranks.is_first:
        if not isinstance(error, RankLostError):
            store.set(f"ended {ranks.rank}", gist(error))
        return
    store.set(_FIRST_ENDED, b"")
    said = [rank for rank in range(1, ranks.size) if store.check([f"ended {rank}"])]
    if said and isinstance(error, RankLostError):
        error.args = (f"rank {said[0]} ended: {store.get(f'ended {said[0]}').decode()}",)


def dealt(costs: Sequence[float], size: int) -> list[int]:
    """Which of `size` ranks gets each piece of work: the costliest first, each to the rank that has least so far."""
    loads, owners = [0.0] * size, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda each: -costs[each]):
        owners[number] = min(range(size), key=lambda rank: loads[rank])
        loads[owners[number]] += costs[number]
    return owners


def _pairs(rank: int, size: int, backend: str) -> tuple[Any, ...]:
    """The groups in which this rank sums, level by level, where the ranks are a power of two; else none."""
    if size & (size - 1):
        return ()
    own, distance = [], 1
    while distance < size:
        for first in range(size):
            if not first & distance:  # every rank makes every group, in the same order
                group = dist.new_group([first, first | distance], backend=backend, timeout=_NO_ANSWER)
                if rank in (first, first | distance):
                    own.append(group)
        distance *= 2
    return tuple(own)


@contextmanager
def _lost() -> Iterator[None]:
    """What the backends raise where a rank is gone, as one line."""
    try:
        yield
    except (RankLostError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGTERM)):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun is about to send it: this rank ends by itself
        raise RankLostError("another rank of this run ended or does not answer") from error


class _Pickler(pickle.Pickler):
    """Leaves tensors out, and notes them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: Any) -> Tensor:
        return self._tensors[number]


def _packed(value: Any, device: torch.device) -> tuple[bytes, Tensor]:
    """A value as bytes, and the content of its tensors, uint8 on `device`."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    shapes = [(tensor.dtype, tuple(tensor.shape)) for tensor in pickler.tensors]
    parts = [each.detach().to(device).contiguous().reshape(-1).view(torch.uint8) for each in pickler.tensors]
    data = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=device)
    return pickle.dumps((shapes, file.getvalue())), data


def _unpacked(form: bytes, data: Tensor, device: torch.device) -> Any:
    """What `_packed` was given, with its tensors on `device`."""
    shapes, content = pickle.loads(form)
    sizes = [dtype.itemsize * torch.Size(shape).numel() for dtype, shape in shapes]
    tensors = [
        part.clone().view(dtype).reshape(shape).to(device)  # a clone begins where its dtype may begin
        for part, (dtype, shape) in zip(data.split(sizes), shapes, strict=True)
    ]
    return _Unpickler(io.BytesIO(content), tensors).load()
