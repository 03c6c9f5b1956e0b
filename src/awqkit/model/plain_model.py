"""A decoder that no library knows: a plain `nn.Module`, and what must be said of it so that it can be run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from awqkit.errors import ModelError, gist
from awqkit.model.block_list import find_block_list, refuse_shared
from awqkit.model.named_blocks import NamedBlocks
from awqkit.model.runnable import Runnable
from awqkit.model.transformers_bridge import is_of_transformers

_ADVICE = (
    "; PlainModel takes blocks=, the path of the list of decoder blocks, and run=, how the module is called: "
    "lambda module, ids: module(ids, ...)"
)
_EMBEDDINGS = {F.embedding: 1, torch.embedding: 0, Tensor.__getitem__: 0}  # function -> which argument is the table
_SHOWN_LISTS = 5


@dataclass(frozen=True, slots=True, eq=False)
class PlainModel:
    """A decoder as a `torch.nn.Module` that is not of transformers. It is read and never changed.

    module: gives logits `[rows, tokens, vocabulary]` for token ids `[rows, tokens]` int64: alone, first in a tuple, or
    as `logits` of an object or dict. blocks: the path of the list of its decoder blocks, an `nn.ModuleList` or
    `nn.Sequential`, or the paths of consecutive blocks; None to have the list found by structure. run(module, ids): how
    the module is called, `module(ids)` where None. vocabulary_size: how many ids it knows; None for the rows of the
    embedding that is seen to take them. encode: text to ids, for calibration and evaluation text, each row of which
    begins with `start_tokens`; without it token rows must be given. name: in reports, the class's where None.
    """

    module: nn.Module
    blocks: str | Sequence[str] | None = None
    run: Callable[[nn.Module, Tensor], Any] | None = None
    vocabulary_size: int | None = None
    encode: Callable[[str], Sequence[int]] | None = None
    start_tokens: Sequence[int] = ()
    name: str | None = None

    @property
    def title(self) -> str:
        """What reports and messages call it."""
        return self.name or type(self.module).__name__


def plain_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, a shared one once, under its first name. Nothing is copied."""
    found: dict[str, Tensor] = dict(module.named_parameters())
    for path, owner in module.named_modules():
        for leaf, value in owner._buffers.items():
            if value is not None and leaf not in owner._non_persistent_buffers_set:
                found[f"{path}.{leaf}".removeprefix(".")] = value
    return found


def plain_runnable(plain: PlainModel) -> Runnable:
    """A copy of the module without its parameters, and how it is run.

    Raises ModelError where the module cannot be copied or its blocks are not where `blocks` says.
    """
    module = plain.module
    if is_of_transformers(module):
        raise ModelError(
            f"{plain.title} is a model of transformers: save it with save_pretrained and give the folder in its place"
        )
    paths, where = _block_paths(module, plain.blocks)
    empty = _empty_copy(module, plain.title)
    calls = _Calls(plain, empty, paths[-1])
    return Runnable(
        module=empty,
        decoder=empty,
        blocks=NamedBlocks(empty, paths),
        where=where,
        reach=calls.reach,
        reach_again=calls.reach_again,
        logits=calls.logits,
        vocabulary_size=calls.vocabulary_size,
        advice=_ADVICE,
    )


def _block_paths(module: nn.Module, blocks: str | Sequence[str] | None) -> tuple[list[str], str]:
    """The path of every block, and what messages call them together."""
    if blocks is None:
        try:
            blocks = find_block_list(module)
        except ModelError as error:
            raise ModelError(f"{error}{_lists_text(module)}{_ADVICE}") from error
    if isinstance(blocks, str):
        holder = _submodule(module, blocks)
        if not isinstance(holder, nn.ModuleList | nn.Sequential) or len(holder) == 0:
            found = "an empty list" if isinstance(holder, nn.ModuleList | nn.Sequential) else type(holder).__name__
            raise ModelError(
                f"blocks={blocks!r} is {found}, expected an nn.ModuleList or nn.Sequential of decoder blocks"
                f"{_lists_text(module)}; consecutive blocks outside a list are given by their paths, as a tuple"
            )
        paths = [f"{blocks}.{name}".removeprefix(".") for name in holder._modules]
        where = blocks or "the module itself"
    else:
        paths = list(blocks)
        if not paths:
            raise ModelError(f"blocks is empty, expected the paths of decoder blocks{_lists_text(module)}")
        where = paths[0] if len(paths) == 1 else f"{paths[0]} … {paths[-1]}"
    refuse_shared([_submodule(module, path) for path in paths], where)
    return paths, where


def _submodule(module: nn.Module, path: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise ModelError(
            f"blocks={path!r}: {type(module).__name__} has no such submodule{_lists_text(module)}"
        ) from error


def _lists_text(module: nn.Module) -> str:
    """The lists of modules that are there, for a message."""
    named = ((path, part) for path, part in module.named_modules() if isinstance(part, nn.ModuleList | nn.Sequential))
    lists = [f"{path or 'the module itself'} ({len(part)})" for path, part in named if len(part)]
    more = f" and {len(lists) - _SHOWN_LISTS} more" if len(lists) > _SHOWN_LISTS else ""
    return f"; its lists of modules are {', '.join(lists[:_SHOWN_LISTS])}{more}" if lists else ""


def _empty_copy(module: nn.Module, title: str) -> nn.Module:
    """The module in eval mode with parameters on the meta device, shared ones shared as before; buffers are copied."""
    memo: dict[int, Any] = {}
    for name, value in module.named_parameters():
        if value.device.type == "meta":
            raise ModelError(f"{title}: {name} is on the meta device, so it has no values; give a module with weights")
        memo[id(value)] = nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False)
    try:
        return copy.deepcopy(module, memo).eval()
    except Exception as error:  # whatever a module holds may refuse to be copied, in its own way
        raise ModelError(
            f"{title}: its structure cannot be copied (copy.deepcopy: {_named(error)}); "
            "give the module as it was before it was compiled, wrapped or run"
        ) from error


class _Stopped(Exception):
    """Raised behind the last block, where nobody asks for what follows."""


class _Calls:
    """How the copy is called, and the embedding that it was seen to look ids up in."""

    def __init__(self, plain: PlainModel, module: nn.Module, last_block: str) -> None:
        self._module, self._run, self._title = module, plain.run, plain.title
        self._last_block = last_block
        self._known_ids = plain.vocabulary_size

    def reach(self, input_ids: Tensor, **_: Any) -> None:
        """The whole forward."""
        with _TableOf(input_ids) as table:
            self._call(input_ids)
        self._known_ids = self._known_ids or table.rows

    def reach_again(self, input_ids: Tensor, **_: Any) -> None:
        """The forward as far as the last block: logits of many tokens are the largest tensors there are."""

        def stop(*_: Any) -> None:
            raise _Stopped

        handle = self._module.get_submodule(self._last_block).register_forward_hook(stop)
        try:
            self._call(input_ids)
        except _Stopped:
            pass
        finally:
            handle.remove()

    def logits(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Raises ModelError where the forward fails, or gives something else than logits of every token."""
        try:
            given = self._call(ids)
        except RuntimeError as error:
            raise ModelError(f"{self._title} cannot be run: {error}{_ADVICE}") from error
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
            raise RuntimeError(_named(error)) from error


class _TableOf(TorchFunctionMode):
    """While active, notes how many rows the table has that `ids` are looked up in."""

    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        self._ids = ids
        self.rows: int | None = None

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in _EMBEDDINGS and self.rows is None:
            given = (*args, *(kwargs[key] for key in ("input", "weight") if key in kwargs))
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


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {gist(error)}"
