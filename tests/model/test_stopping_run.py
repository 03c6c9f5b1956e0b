"""A run that stops and goes on computes what it would have computed at once, on a CPU on the thread that resumes it."""

from __future__ import annotations

import gc
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from awqkit.model import stopping_run
from awqkit.model.stopping_run import Finished, Stop, Stopped, StoppingRun


def test_it_stops_and_goes_on() -> None:
    def body(stop: Stop) -> torch.Tensor:
        doubled = 2 * torch.arange(3.0)
        stop(doubled)
        tripled = doubled.mul(1.5)
        stop(tripled)
        return tripled + doubled

    run = StoppingRun(body)
    first, second, last = run.resume(), run.resume(), run.resume()
    assert isinstance(first, Stopped) and first.value.tolist() == [0, 2, 4]
    assert isinstance(second, Stopped) and second.value.tolist() == [0, 3, 6]
    assert isinstance(last, Finished) and last.value.tolist() == [0, 5, 10]
    run.close()


def test_functions_are_computed_by_whoever_resumes() -> None:
    threads = []

    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            threads.append(threading.get_ident())
            return function(*args, **(kwargs or {}))

    def body(stop: Stop) -> torch.Tensor:
        return torch.nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3)).relu()

    with Seen():
        assert isinstance(StoppingRun(body).resume(), Finished)
    assert len(threads) >= 4 and set(threads) == {threading.get_ident()}


def test_a_gpu_is_told_by_the_body_itself_of_all_but_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping_run, "_place", lambda device: nullcontext())
    threads: dict[str, set[int]] = {}

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            threads.setdefault(str(function).split(".")[1], set()).add(threading.get_ident())
            return function(*args, **(kwargs or {}))

    def body(stop: Stop) -> torch.Tensor:
        with Seen():  # here alone: modes are each thread's own
            hidden = torch.ones(2, 3).mul(3.0)
            stop(hidden)
            return (F.linear(hidden, torch.ones(3, 3)) @ torch.ones(3, 2)).relu()

    run = StoppingRun(body, torch.device("cuda"))
    with Seen():
        assert run.resume().value.tolist() == [[3, 3, 3]] * 2
        last = run.resume()
    assert isinstance(last, Finished) and last.value.tolist() == [[27, 27]] * 2
    run.close()
    own = threading.get_ident()
    assert own not in threads["ones"] | threads["mul"] | threads["relu"]
    assert set.union(*(threads[name] for name in threads if "mm" in name)) == {own}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu_it_works_where_the_one_that_resumes_it_does() -> None:
    stream, streams = torch.cuda.Stream(), []

    def body(stop: Stop) -> torch.Tensor:
        streams.append(torch.cuda.current_stream())
        hidden = torch.ones(2, 3, device="cuda").mul(3.0)
        stop(hidden)
        return (hidden @ torch.ones(3, 2, device="cuda")).relu()

    with torch.cuda.stream(stream):
        run = StoppingRun(body, torch.device("cuda"))
        run.resume()
        last = run.resume()
    assert streams == [stream] and isinstance(last, Finished) and last.value.tolist() == [[9, 9]] * 2
    run.close()


def test_what_the_body_raises_is_raised_where_it_is_resumed() -> None:
    def body(stop: Stop) -> None:
        stop(None)
        torch.ones(2, 3) @ torch.ones(2, 3)

    run = StoppingRun(body)
    run.resume()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run.resume()
    run.close()


def test_the_body_may_be_ready_for_an_error_of_a_function() -> None:
    def body(stop: Stop) -> str:
        try:
            torch.ones(2, 3) @ torch.ones(2, 3)
        except RuntimeError:
            return "another way"
        return "no error"

    assert StoppingRun(body).resume() == Finished("another way")


def test_a_run_that_is_let_go_leaves_no_thread_and_cleans_up() -> None:
    left = []

    def body(stop: Stop) -> None:
        try:
            stop(None)
        except Exception:  # a model's own handler must not keep it alive
            stop(None)
        finally:
            left.append(True)

    before = threading.active_count()
    run = StoppingRun(body)
    run.resume()
    assert threading.active_count() == before + 1
    run.close()
    assert left == [True] and threading.active_count() == before


def test_a_run_that_is_let_go_holds_nothing_of_what_it_computed() -> None:
    computed: list[weakref.ref[torch.Tensor]] = []

    def inner(stop: Stop) -> None:
        large = 2 * torch.ones(3)
        computed.append(weakref.ref(large))
        stop(large.sum())

    gc.collect()
    gc.disable()  # what only a collection would free stays on the device meanwhile
    try:
        run = StoppingRun(lambda stop: inner(stop))
        run.resume()
        run.close()
        assert computed[0]() is None
    finally:
        gc.enable()


def test_a_body_that_computes_while_it_cleans_up_is_let_go_as_well() -> None:
    def body(stop: Stop) -> None:
        try:
            stop(None)
        finally:
            torch.ones(2).add(1)

    before = threading.active_count()
    run = StoppingRun(body)
    run.resume()
    run.close()
    assert threading.active_count() == before


def test_an_interrupt_while_a_function_is_computed_leaves_the_run_to_be_closed() -> None:
    class Interrupted(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            raise KeyboardInterrupt

    before = threading.active_count()
    run = StoppingRun(lambda stop: torch.ones(2))
    with pytest.raises(KeyboardInterrupt), Interrupted():
        run.resume()
    run.close()
    assert threading.active_count() == before


def test_one_never_begun_is_closed_without_a_word() -> None:
    StoppingRun(lambda stop: None).close()


def test_nothing_is_recorded_for_gradients() -> None:
    weight = torch.ones(2, 2, requires_grad=True)
    with torch.no_grad():
        finished = StoppingRun(lambda stop: weight @ weight).resume()
    assert isinstance(finished, Finished) and not finished.value.requires_grad


def test_a_body_that_switches_gradients_does_so_for_itself() -> None:
    """As experts do that look for their tokens without gradients."""

    def body(stop: Stop) -> torch.Tensor:
        with torch.no_grad():
            hit = torch.ones(2) + 1
        stop(hit)
        with torch.enable_grad():
            return hit * 2

    for before in (True, False):
        run = StoppingRun(body)
        with torch.set_grad_enabled(before):
            for expected in (Stopped, Finished):
                assert isinstance(run.resume(), expected)
                assert torch.is_grad_enabled() == before
        run.close()
