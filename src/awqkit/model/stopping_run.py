"""A call that stops half-way and goes on later, with nothing computed twice: a coroutine whose body does not know it.

The body is a model's own forward, which cannot be made a generator. It runs on a thread of its own, and of the two
threads one always waits for the other. On a CPU nothing is computed there: torch functions are handed to the thread
that resumes the run, so that many stopped runs share its pool of workers. To hand one over takes longer than to launch
it, so a GPU is given its work by the body's thread, in the order of the other's; only products are handed over there,
since each thread that multiplies has memory of its own for it on the GPU, which is kept as long as the process.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

Stop = Callable[[Any], None]

_HOST = torch.device("cpu")
# What a library with a handle for each thread may compute, by name: as functions, methods and operators.
_PRODUCTS = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "mv", "dot", "einsum"}
_PRODUCTS |= {"scaled_dot_product_attention", "conv1d", "conv2d", "conv3d", "bilinear", "tensordot", "outer"}


@dataclass(frozen=True, slots=True)
class Stopped:
    """The run called `stop` with this value and waits there."""

    value: Any


@dataclass(frozen=True, slots=True)
class Finished:
    """The run returned this value."""

    value: Any


@dataclass(frozen=True, slots=True)
class _Raised:
    error: BaseException


@dataclass(frozen=True, slots=True)
class _Asked:
    """A torch function that the run needs the result of."""

    function: Callable[..., Any]
    args: tuple
    kwargs: Mapping[str, Any]


class _GivenUp(BaseException):
    """Unwinds a run that nobody will resume; no `except Exception` of a model takes it."""


class StoppingRun:
    """`body(stop)` without gradients, resumed piece by piece. It is to be closed, finished or not.

    device: where the body computes.
    """

    def __init__(self, body: Callable[[Stop], Any], device: torch.device = _HOST) -> None:
        self._told: SimpleQueue[Any] = SimpleQueue()  # by the body's thread
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._place, self._asks_all = _place(device), device.type != "cuda"
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._live, body), daemon=True)
        self._ended = self._given_up = False

    def resume(self) -> Stopped | Finished:
        """Go on to the next stop or the end. Raises what the body raises."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._answers.put(None)
        while True:
            told = self._told.get()
            if isinstance(told, _Asked):
                self._answers.put(_answer(told))
                continue
            self._ended = not isinstance(told, Stopped)
            if isinstance(told, _Raised):
                raise told.error
            return told

    def close(self) -> None:
        """Let go of a run that is stopped, and of its thread, which one that ended is about to leave."""
        if self._thread.ident is None:
            return
        if not self._ended:
            self._given_up = True
            self._answers.put(_Raised(_GivenUp()))
        self._thread.join()
        self._ended = True

    def _live(self, body: Callable[[Stop], Any]) -> None:
        try:
            with torch.no_grad(), self._place, _Deferring(self._ask, asks_all=self._asks_all):
                result = Finished(body(self._stop))
        except _GivenUp as given_up:
            given_up.__traceback__ = None  # its frames hold it, and with it all that the body had computed
            return
        except BaseException as error:
            result = _Raised(error)
        self._told.put(result)

    def _stop(self, value: Any) -> None:
        self._ask(Stopped(value))

    def _ask(self, what: Stopped | _Asked) -> Any:
        if self._given_up:  # the body cleans up, and nobody is there to answer
            raise _GivenUp
        self._told.put(what)
        answer = self._answers.get()
        if isinstance(answer, _Raised):
            raise answer.error
        return answer


def _answer(asked: _Asked) -> Any:
    try:
        return asked.function(*asked.args, **asked.kwargs)
    except Exception as error:  # the body may be ready for it
        return _Raised(error)


def _place(device: torch.device) -> AbstractContextManager[Any]:
    """Another thread inside has its work done on the same device, in turn with this one's."""
    return torch.cuda.stream(torch.cuda.current_stream(device)) if device.type == "cuda" else nullcontext()


class _Deferring(TorchFunctionMode):
    """Torch functions are computed by whoever `ask` asks, all or products alone.

    Reading an attribute of a tensor is not worth that. Whether gradients are recorded is each thread's own: a body that
    switches them off and on does so for itself.
    """

    def __init__(self, ask: Callable[[_Asked], Any], *, asks_all: bool) -> None:
        super().__init__()
        self._ask, self._asks_all = ask, asks_all

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(function, "__name__", "")
        asks = name != "__get__" and function is not torch._C._set_grad_enabled if self._asks_all else name in _PRODUCTS
        return self._ask(_Asked(function, args, kwargs or {})) if asks else function(*args, **(kwargs or {}))
