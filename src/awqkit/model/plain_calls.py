"""How a plain module is called, and what its forward shows on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from awqkit.errors import ModelError, gist

ADVICE = (
    "; PlainModel takes blocks=, the path of the list of decoder blocks, and run=, how the module is called: "
    "lambda module, ids: module(ids, ...)"
)
_EMBEDDINGS = {F.embedding: 1, torch.embedding: 0, Tensor.__getitem__: 0}  # function -> which argument is the table


class _Stopped(Exception):
    """Raised behind the last block, where nobody asks for what follows."""


class PlainCalls:
    """How the copy is called, and the embedding that it was seen to look ids up in."""

    def __init__(
        self,
        module: nn.Module,
        run: Callable[[nn.Module, Tensor], Any] | None,
        vocabulary_size: int | None,
        title: str,
    ) -> None:
        self._module, self._run, self._title = module, run, title
        self._known_ids = vocabulary_size

    def reach(self, input_ids: Tensor, **_: Any) -> None:
        """The whole forward."""
        with _TableOf(input_ids) as table:
            try:
                self._call(input_ids)
            finally:
                self._known_ids = self._known_ids or table.rows

    def reach_blocks(self, last: str) -> Callable[..., None]:
        """The forward as far as the block at `last`: logits of many tokens are the largest tensors there are."""

        def stop(*_: Any) -> None:
            raise _Stopped

        def forward(input_ids: Tensor, **_: Any) -> None:
            handle = self._module.get_submodule(last).register_forward_hook(stop)
            try:
                self._call(input_ids)
            except _Stopped:
                pass
            finally:
                handle.remove()

        return forward

    def logits(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Raises ModelError where the forward fails, or gives something else than logits of every token."""
        try:
            given = self._call(ids)
        except RuntimeError as error:
            raise ModelError(f"{self._title} cannot be run: {error}{ADVICE}") from error
        found = _logits_of(given)
        if found is None or found.dim() != 3 or found.shape[:2] != ids.shape:
            what = type(given).__name__ if found is None else f"logits of shape {list(found.shape)}"
            raise ModelError(
                f"{self._title} gives {what} for {len(ids)} rows of {ids.shape[1]} tokens, expected "
                f"[{len(ids)}, {ids.shape[1]}, vocabulary], which end-loss gradients and tuning need; "
                "PlainModel(run=lambda module, ids: ...) says how to get it"
            )
        return found

    def vocabulary_size(self) -> int:
        """Raises ModelError where it is not known."""
        if self._known_ids is None:
            raise ModelError(
                f"{self._title}: no embedding was seen to take the token ids, so how many it knows is not clear; "
                "pass PlainModel(vocabulary_size=...)"
            )
        return self._known_ids

    def _call(self, ids: Tensor) -> Any:
        try:
            return self._module(ids) if self._run is None else self._run(self._module, ids)
        except (ModelError, _Stopped, torch.OutOfMemoryError):
            raise
        except Exception as error:  # somebody's own code: anything
            raise RuntimeError(named(error)) from error


class _TableOf(TorchFunctionMode):
    """While active, notes how many rows the table has that `ids` are looked up in."""

    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        self._ids = ids
        self.rows: int | None = None

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = (*args, *(kwargs[key] for key in ("input", "weight") if key in kwargs))
        if function in _EMBEDDINGS and len(given) > 1 and self.rows is None:
            table, asked = given[_EMBEDDINGS[function]], given[1 - _EMBEDDINGS[function]]
            if isinstance(asked, Tensor) and asked.dtype == self._ids.dtype and table.dim() == 2:
                same = asked.numel() == self._ids.numel() and torch.equal(asked.reshape(-1), self._ids.reshape(-1))
                self.rows = table.shape[0] if same else None
        return function(*args, **kwargs)


def _logits_of(given: Any) -> Tensor | None:
    """The logits in what a forward gives back."""
    if isinstance(given, dict):
        given = given.get("logits")
    elif hasattr(given, "logits"):
        given = given.logits
    elif isinstance(given, Iterable) and not isinstance(given, Tensor):
        given = next(iter(given), None)
    return given if isinstance(given, Tensor) else None


def named(error: BaseException) -> str:
    """An error of somebody else's code in one line, with its kind."""
    return f"{type(error).__name__}: {gist(error)}"
