"""What a graph cannot hold is refused; on a GPU what is called alike is replayed, and gives what it gives as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
