"""Work of many small operators, captured as a CUDA graph for tensors of some shapes and replayed for others of them.

A search on a small weight is hundreds of operators, which a GPU is done with sooner than Python has launched them. All
blocks of a model have weights of the same shapes, so a graph that reads and writes buffers of its own does for each:

    copy in ─► replay ─► copy out

One small search leaves most of a GPU idle, so several run side by side: each on a lane, which has a stream, buffers and
graphs of its own.

It takes pure functions: tensors, and choices that can be hashed, in dataclasses and tuples, to the same. What a graph
cannot hold is what makes the host wait for the device, and tensors that are made of numbers of the host.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from awqkit.kernels.capture import beside_usual_stream

Result = TypeVar("Result")

# Of all tensors that go into a graph, 64 MB of float32: what a GPU computes with more takes it longer than the launches
# take Python, and a graph keeps some ten times as much on the device.
MOST_VALUES = 1 << 24
NUM_LANES = 4
_CALLS_A_CAPTURE = 32  # of one graph, before another lane gets its own: a capture takes as long as many replays
_MOST_BEGUN = 2 * NUM_LANES  # works at a time: what they need is held until each is done
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

    What it holds of the device until `let_go`, for each lane that was needed: a buffer for each shape that goes in,
    what comes out of each graph, and one pool for all that is computed on the way. why_not: what stood in the way of
    the first graph that could not be captured, None where nothing did. told: an error in words; the error itself would
    hold the tensors of its frames.
    """

    def __init__(self, told: Callable[[BaseException], str] = str) -> None:
        self.why_not: str | None = None
        self._told = told
        self._met = Counter[Hashable]()
        self._as_they_are: set[Hashable] = set()
        self._lanes: list[_Lane] = []
        self._has_room = True

    @property
    def num_captured(self) -> int:
        """How many graphs there are."""
        return sum(len(lane.graphs) for lane in self._lanes)

    def let_go(self) -> None:
        """Hold no graph and no buffer, and make none any more: where memory is short, or wanted for something else."""
        for lane in self._lanes:
            lane.let_go()
        self._lanes.clear()
        self._has_room = False

    def call(self, function: Callable[..., Result], *given: Any) -> Result:
        """`function(*given)`. It is captured at the second call with tensors and choices like these."""
        return self.begin(function, *given)()

    def begin(self, function: Callable[..., Result], *given: Any) -> Callable[[], Result]:
        """`call`, which goes on beside what follows until the result is asked for. What is given may change at once."""
        if not (self._has_room and torch.cuda.is_initialized()):
            return _done(function(*given))
        tensors: list[Tensor] = []
        form = _taken_apart(given, tensors)
        if not _takes(tensors):
            return _done(function(*given))
        key = _alike(function, form, tensors)
        self._met[key] += 1
        if key in self._as_they_are or self._met[key] == 1:
            return _done(function(*given))
        lane = self._lane_for(key, tensors[0].device)
        if key not in lane.graphs and not self._capture(lane, key, function, form, tensors):
            return _done(function(*given))
        return lane.begin(lane.graphs[key], tensors)

    def overlapped(self, works: Iterable[Callable[[], Callable[[], Result]]]) -> list[Result]:
        """What each of some works gives, which is begun by calling it and asked for by calling what that returns.

        Others are begun before one that is replayed is done. Where nothing is replayed each is done before the next.
        """
        begun, results = deque[Callable[[], Result]](), list[Result]()
        for work in works:
            begun.append(work())
            while begun and (len(begun) == _MOST_BEGUN or not any(lane.num_begun for lane in self._lanes)):
                results.append(begun.popleft()())
        return results + [result() for result in begun]

    def _lane_for(self, key: Hashable, device: torch.device) -> _Lane:
        """One that has a graph of that key and little under way; another, once that is worth a capture."""
        having = [lane for lane in self._lanes if key in lane.graphs]
        lane = min(having, key=_begun_on, default=None)
        if lane is not None and (lane.num_begun == 0 or self._met[key] < _CALLS_A_CAPTURE * len(having)):
            return lane
        others = [each for each in self._lanes if key not in each.graphs]
        if len(self._lanes) < NUM_LANES and all(each.num_begun for each in others):
            others = [_Lane(device)]
            self._lanes += others
        return min(others or having, key=_begun_on)

    def _capture(
        self, lane: _Lane, key: Hashable, function: Callable[..., Any], form: Any, tensors: Sequence[Tensor]
    ) -> bool:
        """Whether it was. What cannot be captured is run as it is, which says by itself if memory is short."""
        try:
            lane.capture(key, function, form, tensors)
        except Exception as error:  # what stands in the way of a graph is no error of the work
            self._as_they_are.add(key)
            self.why_not = self.why_not or self._told(error)
            if isinstance(error, torch.OutOfMemoryError):
                self.let_go()
            return False
        return True


def _begun_on(lane: _Lane) -> int:
    return lane.num_begun


class _Lane:
    """Graphs that share buffers and a pool, so that one of them runs at a time, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.stream, self.graphs = torch.cuda.Stream(device), dict[Hashable, _Replay]()
        self.num_begun = 0  # whose results nobody has asked for
        self._pool, self._buffers = torch.cuda.graph_pool_handle(), dict[Hashable, Tensor]()

    def capture(self, key: Hashable, function: Callable[..., Any], form: Any, tensors: Sequence[Tensor]) -> None:
        """Have a graph of that key."""
        device = tensors[0].device
        torch.cuda.current_stream(device).wait_stream(self.stream)
        inputs = [self._buffer(number, each) for number, each in enumerate(tensors)]
        torch._foreach_copy_(inputs, list(tensors))
        work = _Work(function, form, inputs)
        try:
            with beside_usual_stream(device, self.stream), WaitingRefused():
                work()  # what a library sets up when it is first called, and what waits, come before the capture
                self.graphs[key] = _Replay(work, self._pool)
        except Exception:
            self._pool = torch.cuda.graph_pool_handle()  # nobody knows in what state the other is
            raise

    def begin(self, graph: _Replay, tensors: Sequence[Tensor]) -> Callable[[], Any]:
        """Replay a graph for some tensors once what was begun before is done; what it made, for the usual stream."""
        usual = torch.cuda.current_stream(self.stream.device)
        usual.wait_stream(self.stream)  # which reads the buffers
        torch._foreach_copy_(graph.inputs, list(tensors))
        made = [torch.empty_like(each) for each in graph.outputs]
        self.stream.wait_stream(usual)
        with torch.cuda.stream(self.stream):
            graph.replay()
            torch._foreach_copy_(made, graph.outputs)
        for each in made:
            each.record_stream(self.stream)  # whoever drops it unread leaves it until it is written
        form, done = graph.form, self.stream.record_event()
        self.num_begun += 1

        def result() -> Any:
            self.num_begun -= 1
            torch.cuda.current_stream(self.stream.device).wait_event(done)
            return _put_together(form, made)

        return result

    def let_go(self) -> None:
        """Hold no graph and no buffer, though results are waited for: they are there, in memory of their own."""
        self.stream.synchronize()  # what it computes in is for all streams from now on
        self.graphs.clear()
        self._buffers.clear()

    def _buffer(self, number: int, like: Tensor) -> Tensor:
        """Where a tensor is copied to: one place for all graphs that take the like, since none keeps anything there."""
        key = (number, like.shape, like.stride(), like.dtype, like.device)
        if key not in self._buffers:
            self._buffers[key] = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
        return self._buffers[key]


def _done(result: Result) -> Callable[[], Result]:
    return lambda: result


def begun(replays: Replays | None, function: Callable[..., Result], *given: Any) -> Callable[[], Result]:
    """`Replays.begin`; where there are none the function is called."""
    return _done(function(*given)) if replays is None else replays.begin(function, *given)


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
        self.inputs, self.outputs = list(work.inputs), list[Tensor]()
        self._graph = torch.cuda.CUDAGraph()
        # not by `torch.cuda.graph`, which empties the allocator's cache before each of a dozen captures
        self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            result = work()
        finally:
            self._graph.capture_end()
        self.form = _taken_apart(result, self.outputs)

    def replay(self) -> None:
        """Compute the outputs from what the inputs hold now, on the current stream."""
        self._graph.replay()


class _Place(NamedTuple):
    """Where the tensor of that number belongs."""

    number: int


class _Parts(NamedTuple):
    """What is made of parts: a tuple, or a dataclass by its fields."""

    kind: type
    parts: tuple[Any, ...]


def _taken_apart(value: Any, tensors: list[Tensor]) -> Any:
    """What is left of a value without its tensors, which are added to `tensors`. It can be hashed."""
    if isinstance(value, Tensor):
        for number, known in enumerate(tensors):
            if known is value:
                return _Place(number)
        tensors.append(value)
        return _Place(len(tensors) - 1)
    if isinstance(value, tuple):
        return _Parts(tuple, tuple([_taken_apart(each, tensors) for each in value]))
    kind = type(value)
    names = _field_names(kind)
    if names is None:
        return value
    return _Parts(kind, tuple([_taken_apart(getattr(value, name), tensors) for name in names]))


@cache
def _field_names(kind: type) -> tuple[str, ...] | None:
    """Of a dataclass, None for what is none."""
    return tuple(field.name for field in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else None


def _put_together(form: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(form, _Place):
        return tensors[form.number]
    if isinstance(form, _Parts):
        parts = tuple(_put_together(each, tensors) for each in form.parts)
        return parts if form.kind is tuple else form.kind(*parts)
    return form
