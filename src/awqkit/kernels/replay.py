"""Work of many small operators, captured as a CUDA graph for tensors of some shapes and replayed for others of them.

A search on a small weight is hundreds of operators, which a GPU is done with sooner than Python has launched them. All
blocks of a model have weights of the same shapes, so a graph that reads and writes buffers of its own does for each:

    copy in ─► replay ─► copy out

It takes pure functions: tensors, and choices that can be hashed, in dataclasses and tuples, to the same. What a graph
cannot hold is what makes the host wait for the device, and tensors that are made of numbers of the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from awqkit.kernels.capture import beside_usual_stream

Result = TypeVar("Result")

# Of all tensors that go into a graph, 64 MB of float32: what a GPU computes with more takes it longer than the launches
# take Python, and a graph keeps some ten times as much on the device.
MOST_VALUES = 1 << 24
_MET, _AS_IT_IS = "met once", "run as it is"  # what is known of calls alike that there is no graph of
_ON_THE_HOST = {"aten.lift_fresh", "aten.lift"}  # what `torch.tensor` of a list ends with
_INDEXING = {"aten.index", "aten.index_put", "aten.index_put_"}  # which only masks make wait
_COPYING = {"aten._to_copy", "aten.copy_", "aten.copy"}


class WaitingRefused(TorchDispatchMode):
    """Inside, in this thread, an operator that no graph can hold raises RuntimeError, on any device.

    It waits for the device, copies to or from it, draws random numbers, or makes a tensor of numbers of the host.
    """

    depth = 0  # how many of them are entered: a search is one thread's

    def __enter__(self) -> WaitingRefused:
        WaitingRefused.depth += 1
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        WaitingRefused.depth -= 1
        super().__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reason = _why_not(func, args, kwargs or {})
        if reason is not None:
            raise RuntimeError(f"{func} {reason}: no graph can hold it")
        return func(*args, **(kwargs or {}))


def may_look() -> bool:
    """Whether the host may look at a tensor to see if a loop is done; a graph has to run it to its end."""
    return WaitingRefused.depth == 0


def _why_not(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
    name = str(func).rpartition(".")[0]
    if name in _INDEXING:
        masks = [each for each in args[1] if each is not None and each.dtype in (torch.bool, torch.uint8)]
        return "picks by a mask" if masks else None
    if name in _COPYING:
        ends = [args[0].device, *(each.device for each in args[1:2] if isinstance(each, Tensor)), kwargs.get("device")]
        return "copies from device to device" if len({end for end in ends if end is not None}) > 1 else None
    if name in _ON_THE_HOST:
        return "makes a tensor of numbers of the host"
    if torch.Tag.nondeterministic_seeded in func.tags:
        return "draws random numbers"
    waits = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
    return "waits for the device" if waits else None


@cache
def constants(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers of the code as float32 on a device, made once and kept, as graphs read them. Not to be written to."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)


class Replays:
    """Calls functions, on a GPU those that were called alike before by replaying them. One thread's.

    What it holds of the device until `let_go`: a buffer for each shape that goes in, what comes out of each graph, and
    one pool for all that is computed on the way. why_not: what stood in the way of the first graph that could not be
    captured, None where nothing did. told: an error in words; the error itself would hold the tensors of its frames.
    """

    def __init__(self, told: Callable[[BaseException], str] = str) -> None:
        self.why_not: str | None = None
        self._told = told
        self._known: dict[Hashable, _Replay | str] = {}
        self._buffers: dict[Hashable, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._has_room = True

    @property
    def num_captured(self) -> int:
        """How many graphs there are."""
        return sum(isinstance(each, _Replay) for each in self._known.values())

    def let_go(self) -> None:
        """Hold no graph and no buffer, and make none any more: where memory is short, or wanted for something else."""
        self._known.clear()
        self._buffers.clear()
        self._stream, self._pool, self._has_room = None, None, False

    def call(self, function: Callable[..., Result], *given: Any) -> Result:
        """`function(*given)`. It is captured at the second call with tensors and choices like these."""
        if not (self._has_room and torch.cuda.is_initialized()):
            return function(*given)
        tensors: list[Tensor] = []
        form = _taken_apart(given, tensors)
        if not _takes(tensors):
            return function(*given)
        key = _alike(function, form, tensors)
        known = self._known.get(key)
        if known is None:
            self._known[key] = _MET
        elif known == _MET:
            self._known[key] = known = self._captured(function, form, tensors)
        return known(tensors) if isinstance(known, _Replay) else function(*given)

    def _captured(self, function: Callable[..., Any], form: Any, tensors: Sequence[Tensor]) -> _Replay | str:
        """What cannot be captured is run as it is, which says by itself if memory is short."""
        device = tensors[0].device
        if self._stream is None:
            self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        try:
            inputs = [self._buffer(number, each) for number, each in enumerate(tensors)]
            torch._foreach_copy_(inputs, list(tensors))
            work = _Work(function, form, inputs)
            with beside_usual_stream(device, self._stream), WaitingRefused():
                work()  # what a library sets up when it is first called, and what waits, come before the capture
                found = _Replay(work, self._pool)
        except Exception as error:  # what stands in the way of a graph is no error of the work
            self.why_not = self.why_not or self._told(error)
            if isinstance(error, torch.OutOfMemoryError):
                self.let_go()
            else:
                self._pool = torch.cuda.graph_pool_handle()  # nobody knows in what state the other is
            return _AS_IT_IS
        return found

    def _buffer(self, number: int, like: Tensor) -> Tensor:
        """Where a tensor is copied to: one place for all graphs that take the like, since none keeps anything there."""
        key = (number, like.shape, like.stride(), like.dtype, like.device)
        if key not in self._buffers:
            self._buffers[key] = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
        return self._buffers[key]


def called(replays: Replays | None, function: Callable[..., Result], *given: Any) -> Result:
    """`function(*given)`, by `replays` where there are any."""
    return function(*given) if replays is None else replays.call(function, *given)


def _alike(function: Callable[..., Any], form: Any, tensors: Sequence[Tensor]) -> Hashable:
    """What is the same for all calls that one graph does for."""
    shapes = tuple((each.shape, each.stride(), each.dtype, each.device) for each in tensors)
    return function, form, shapes, torch.get_float32_matmul_precision()


def _takes(tensors: Sequence[Tensor]) -> bool:
    if not tensors or any(not each.is_cuda for each in tensors):
        return False
    dense = all(each.numel() == 0 or 0 not in each.stride() for each in tensors)  # else places to copy to overlap
    return dense and sum(each.numel() for each in tensors) <= MOST_VALUES


class _Work:
    """A function with its arguments in place."""

    def __init__(self, function: Callable[..., Any], form: Any, inputs: Sequence[Tensor]) -> None:
        self._function, self._form, self.inputs = function, form, inputs

    def __call__(self) -> Any:
        return self._function(*_put_together(self._form, self.inputs))


class _Replay:
    """A graph of some work, captured on the current stream."""

    def __init__(self, work: _Work, pool: Any) -> None:
        self._inputs, self._graph = list(work.inputs), torch.cuda.CUDAGraph()
        # not by `torch.cuda.graph`, which empties the allocator's cache before each of a dozen captures
        self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            result = work()
        finally:
            self._graph.capture_end()
        self._outputs: list[Tensor] = []
        self._form = _taken_apart(result, self._outputs)

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        torch._foreach_copy_(self._inputs, list(tensors))
        self._graph.replay()
        return _put_together(self._form, [each.clone() for each in self._outputs])


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Where the tensor of that number belongs."""

    number: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Parts:
    """What is made of parts: a tuple, or a dataclass by its fields."""

    kind: type
    parts: tuple[Any, ...]


def _taken_apart(value: Any, tensors: list[Tensor]) -> Any:
    """What is left of a value without its tensors, which are added to `tensors`. It can be hashed."""
    if isinstance(value, Tensor):
        known = (number for number, each in enumerate(tensors) if each is value)
        number = next(known, len(tensors))
        if number == len(tensors):
            tensors.append(value)
        return _Place(number)
    if isinstance(value, tuple):
        return _Parts(tuple, tuple(_taken_apart(each, tensors) for each in value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (getattr(value, name) for name in _field_names(type(value)))
        return _Parts(type(value), tuple(_taken_apart(each, tensors) for each in fields))
    return value


@cache
def _field_names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def _put_together(form: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(form, _Place):
        return tensors[form.number]
    if isinstance(form, _Parts):
        parts = tuple(_put_together(each, tensors) for each in form.parts)
        return parts if form.kind is tuple else form.kind(*parts)
    return form
