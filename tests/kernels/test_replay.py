"""What a graph cannot hold is refused; on a GPU what is called alike is replayed, and gives what it gives as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from awqkit.kernels import replay
from awqkit.kernels.replay import Replays, WaitingRefused, constants, may_look

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@dataclass(frozen=True)
class Pair:
    first: Tensor
    rest: tuple[Tensor, ...]
    name: str


def _work(pair: Pair, factor: float, none: None) -> Pair:
    """Reads constants and gives one tensor twice."""
    total = (pair.first * factor + sum(pair.rest)) * constants((1.0, 2.0, 3.0), pair.first.device)
    return Pair(total, (total, pair.rest[0][:, :2]), pair.name)


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.clone().index_put_((x > 0,), x[0, 0]),
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: torch.bincount(x.flatten().long()),
        lambda x: torch.tensor([1.0, 2.0]),
        lambda x: torch.rand_like(x),
        lambda x: x.to("meta"),
    ],
    ids=["item", "mask", "put by a mask", "nonzero", "equal", "bincount", "list", "random", "transfer"],
)
def test_what_no_graph_can_hold_is_refused(work: Callable[[Tensor], object]) -> None:
    x = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="no graph can hold it"), WaitingRefused():
        work(x)
    assert may_look()


def test_what_a_graph_can_hold_is_not_refused() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    with WaitingRefused():
        assert not may_look()
        found = x[:, torch.arange(2)] + torch.zeros(2).to(torch.float64).sum()
        found[:, torch.arange(2)] = found.sort(dim=1, stable=True).values
    assert found.tolist() == [[0.0, 1.0], [3.0, 4.0]]


def test_values_are_taken_apart_and_put_together_with_each_tensor_once() -> None:
    x, y = torch.ones(2), torch.zeros(3)
    tensors: list[Tensor] = []
    form = replay._taken_apart((Pair(x, (y, x), "a"), None, torch.float16), tensors)
    assert [each is other for each, other in zip(tensors, (x, y), strict=True)] == [True, True]
    assert form == replay._taken_apart((Pair(y, (x, y), "a"), None, torch.float16), []) and hash(form) is not None
    assert form != replay._taken_apart((Pair(x, (y, y), "a"), None, torch.float16), [])
    pair, none, dtype = replay._put_together(form, [y, x])
    assert pair.first is y and pair.rest[0] is x and pair.rest[1] is y and (none, dtype) == (None, torch.float16)


def test_a_cpu_calls_the_function_itself() -> None:
    replays, given = Replays(), Pair(torch.ones(2, 3), (torch.ones(2, 3),), "a")
    found = [replays.call(_work, given, 2.0, None) for _ in range(3)]
    assert replays.num_captured == 0 and found[2].first.tolist() == [[3.0, 6.0, 9.0]] * 2


def test_each_work_is_done_before_the_next_where_nothing_is_replayed() -> None:
    said = list[str]()

    def work(number: int) -> Callable[[], int]:
        said.append(f"begin {number}")
        return lambda: said.append(f"done {number}") or number

    assert Replays().overlapped([partial(work, number) for number in range(3)]) == [0, 1, 2]
    assert said == ["begin 0", "done 0", "begin 1", "done 1", "begin 2", "done 2"]


def test_some_works_are_begun_before_the_first_that_is_replayed_is_done() -> None:
    replays, lane = Replays(), SimpleNamespace(num_begun=0)
    replays._lanes, most = [lane], list[int]()

    def work(number: int) -> Callable[[], int]:
        lane.num_begun += 1
        most.append(lane.num_begun)

        def done() -> int:
            lane.num_begun -= 1
            return number

        return done

    assert replays.overlapped([partial(work, number) for number in range(30)]) == list(range(30))
    assert max(most) == replay._MOST_BEGUN and lane.num_begun == 0


def test_another_lane_gets_a_graph_only_once_it_is_worth_a_capture() -> None:
    def lane(*keys: str, num_begun: int = 1) -> SimpleNamespace:
        return SimpleNamespace(graphs=dict.fromkeys(keys), num_begun=num_begun)

    replays, device = Replays(), torch.device("cpu")
    idle, having, busy = lane("b", num_begun=0), lane("a", num_begun=2), lane("b")
    replays._lanes = [idle, having, busy, lane("b", "c")]
    replays._met["a"] = replay._CALLS_A_CAPTURE - 1
    assert replays._lane_for("a", device) is having  # and waits its turn there
    replays._met["a"] += 1
    assert replays._lane_for("a", device) is idle
    having.num_begun = 0
    assert replays._lane_for("a", device) is having
    replays._met["new"] = 2
    assert replays._lane_for("new", device) in (idle, having)
    for each in replays._lanes:
        each.graphs["a"], each.num_begun = None, 1
    busy.num_begun, replays._met["a"] = 0, 1000
    assert replays._lane_for("a", device) is busy  # all have one


@needs_cuda
def test_on_a_gpu_works_side_by_side_give_what_each_gives_alone() -> None:
    def work(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(20):
            x = torch.tanh(x @ y)
        return x, x.sum(dim=0)

    replays = Replays()
    given = [tuple(torch.randn(200, 200, device="cuda") for _ in range(2)) for _ in range(40)]
    expected = [[each.clone() for each in work(*pair)] for pair in given]

    def begin(pair: tuple[Tensor, Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        pair = tuple(each.clone() for each in pair)
        found = replays.begin(work, *pair)
        pair[0].zero_(), pair[1].zero_()  # what was given may change at once
        return found

    for _ in range(3):
        found = replays.overlapped([partial(begin, pair) for pair in given])
        torch.full((40, 200, 200), 7.0, device="cuda")  # memory that was let go is somebody else's now
        for pair, wanted in zip(found, expected, strict=True):
            assert all(torch.equal(each, other) for each, other in zip(pair, wanted, strict=True))
    assert replays.num_captured == replay.NUM_LANES
    replays.begin(work, *given[0])  # nobody asks for it
    replays.let_go()
    assert replays.num_captured == 0


@needs_cuda
def test_a_gpu_replays_from_the_third_call_on_and_gives_the_same() -> None:
    replays, calls = Replays(), []

    def counted(*given: object) -> Pair:
        calls.append(None)
        return _work(*given)

    kept = []
    for _ in range(5):
        given = Pair(torch.randn(2, 3, device="cuda"), (torch.randn(2, 3, device="cuda"),) * 2, "a")
        kept.append((replays.call(counted, given, 2.0, None), _work(given, 2.0, None)))
    assert replays.num_captured == 1 and len(calls) == 3  # as it is, then once before the capture and once in it
    for found, expected in kept:
        assert torch.equal(found.first, expected.first) and torch.equal(found.rest[1], expected.rest[1])
        assert found.name == "a"
    replays.let_go()
    replays.call(counted, given, 2.0, None)
    assert replays.num_captured == 0 and len(calls) == 4


@needs_cuda
def test_on_a_gpu_what_waits_too_much_or_what_is_large_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    replays, x = Replays(), torch.ones(4, device="cuda")
    assert [replays.call(lambda x: x * float(x.sum()), x).tolist() for _ in range(3)] == [[4.0] * 4] * 3

    def waits(x: Tensor) -> Tensor:
        return x * float(x.sum())

    def hidden(x: Tensor) -> Tensor:
        torch.cuda.synchronize()  # which only the capture notices
        return x + 1

    usual = torch.cuda.current_stream()
    for work in (waits, hidden):
        assert [replays.call(work, x).tolist() for _ in range(3)] == [work(x).tolist()] * 3
    assert replays.num_captured == 0 and torch.cuda.current_stream() == usual
    assert replays.why_not is not None and "waits for the device" in replays.why_not
    assert [replays.call(torch.neg, x).tolist() for _ in range(3)] == [[-1.0] * 4] * 3
    assert replays.num_captured == 1
    monkeypatch.setattr(replay, "MOST_VALUES", 3)
    assert replays.call(torch.exp, x).tolist() == replays.call(torch.exp, x).tolist()
    assert replays.num_captured == 1
