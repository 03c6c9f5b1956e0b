"""A decoder that no library knows: a plain `nn.Module`, and what must be said of it so that it can be run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from awqkit.errors import ModelError, UsageError
from awqkit.model.block_list import find_block_lists
from awqkit.model.named_blocks import NamedBlocks
from awqkit.model.plain_calls import ADVICE, PlainCalls, named
from awqkit.model.runnable import Runnable
from awqkit.model.transformers_bridge import is_of_transformers

_SHOWN_LISTS = 5


@dataclass(frozen=True, slots=True, eq=False)
class PlainModel:
    """A decoder as a `torch.nn.Module` that is not of transformers. It is read and never changed.

    module: gives logits `[rows, tokens, vocabulary]` for token ids `[rows, tokens]` int64: alone, first in a tuple, or
    as `logits` of an object or dict. blocks: the path of the list of its decoder blocks, an `nn.ModuleList` or
    `nn.Sequential`, or the paths of consecutive blocks; None to have the list found by structure. run(module, ids): how
    the module is called, `module(ids)` where None. vocabulary_size: how many ids it knows; None for the rows of the
    embedding that is seen to take them. encode: text to ids, for calibration and evaluation text, each row of which
    begins with `start_tokens`; without it token rows must be given. name: in reports, the class's where None. Raises
    UsageError for what is no module.
    """

    module: nn.Module
    blocks: str | Sequence[str] | None = None
    run: Callable[[nn.Module, Tensor], Any] | None = None
    vocabulary_size: int | None = None
    encode: Callable[[str], Sequence[int]] | None = None
    start_tokens: Sequence[int] = ()
    name: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.module, nn.Module):
            raise UsageError(f"PlainModel takes a torch.nn.Module, not {type(self.module).__name__}")

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
    named_lists = _lists(module, plain.blocks)
    empty = _empty_copy(module, plain.title)
    calls = PlainCalls(empty, plain.run, plain.vocabulary_size, plain.title)
    return Runnable(
        module=empty,
        decoder=empty,
        lists=tuple(NamedBlocks(empty, each.paths, each.where) for each in named_lists),
        reach=calls.reach,
        reach_blocks=calls.reach_blocks,
        logits=calls.logits,
        vocabulary_size=calls.vocabulary_size,
        advice=ADVICE,
    )


def _lists(module: nn.Module, blocks: str | Sequence[str] | None) -> list[NamedBlocks]:
    """The blocks that were named, or each list that they may be."""
    if blocks is None:
        try:
            return [NamedBlocks.of_list(module, path) for path in find_block_lists(module)]
        except ModelError as error:
            raise ModelError(f"{error}{_lists_text(module)}{ADVICE}") from error
    if isinstance(blocks, str):
        holder = _submodule(module, blocks)
        if not isinstance(holder, nn.ModuleList | nn.Sequential) or len(holder) == 0:
            found = "an empty list" if isinstance(holder, nn.ModuleList | nn.Sequential) else type(holder).__name__
            raise ModelError(
                f"blocks={blocks!r} is {found}, expected an nn.ModuleList or nn.Sequential of decoder blocks"
                f"{_lists_text(module)}; consecutive blocks outside a list are given by their paths, as a tuple"
            )
        return [NamedBlocks.of_list(module, blocks)]
    paths = list(blocks)
    if not paths:
        raise ModelError(f"blocks is empty, expected the paths of decoder blocks{_lists_text(module)}")
    if len({id(_submodule(module, path)) for path in paths}) != len(paths):
        raise ModelError(f"blocks names a module twice: {', '.join(paths)}; each runs once")
    return [NamedBlocks(module, paths, paths[0] if len(paths) == 1 else f"{paths[0]} … {paths[-1]}")]


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
    for name, value in module.named_parameters():
        if value.device.type == "meta":
            raise ModelError(f"{title}: {name} is on the meta device, so it has no values; give a module with weights")
    try:
        memo: dict[int, Any] = {
            id(value): nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False)
            for value in module.parameters()
        }
        return copy.deepcopy(module, memo).eval()
    except Exception as error:  # whatever a module holds may refuse to be copied, in its own way
        raise ModelError(
            f"{title}: its structure cannot be copied (copy.deepcopy: {named(error)}); "
            "give the module as it was before it was compiled, wrapped or run"
        ) from error
