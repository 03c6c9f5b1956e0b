"""Which packed linears read one input: seen in a forward pass of the model, not known by a name."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from awqkit.evaluation.joined_products import JoinedProducts
from awqkit.evaluation.packed_linear import PackedLinear
from awqkit.kernels.int4_chunks import can_be_joined
from awqkit.kernels.int4_matmul import CHUNKS

Read = tuple[str, PackedLinear, Tensor, int]  # path of a linear, what it read, and how often that had been changed


def join_products(model: nn.Module, device: torch.device) -> None:
    """Linears of the model that get the very same tensor, unchanged in between, become readers of `JoinedProducts`.

    Only those that use the kernel CHUNKS, and are called once in a pass of one token. A model that cannot be called
    with the ids of one token alone stays as it is.
    """
    linears = {path: part for path, part in model.named_modules() if _can_be_joined(part)}
    if len(linears) < 2:
        return
    reads: list[Read] = []
    hooks = [part.register_forward_pre_hook(partial(_note, reads, path)) for path, part in linears.items()]
    try:
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.long, device=device))
    except Exception:  # a model's own code raises many kinds; products apart are as right
        return
    finally:
        for hook in hooks:
            hook.remove()
    for readers in _readers_of_one_input(reads):
        holder = _holder(model, list(readers))
        joined = JoinedProducts([linear.chunks for linear in readers.values()])
        for position, linear in enumerate(readers.values()):
            linear.join(joined, position)
        holder.register_forward_pre_hook(joined.open)
        holder.register_forward_hook(joined.close)


def _can_be_joined(part: nn.Module) -> bool:
    if not isinstance(part, PackedLinear) or part.kernel != CHUNKS or part.joined is not None:
        return False
    return can_be_joined(part.chunks)


def _note(reads: list[Read], path: str, linear: PackedLinear, args: tuple[Any, ...]) -> None:
    if args:
        reads.append((path, linear, args[0], args[0]._version))


def _readers_of_one_input(reads: list[Read]) -> list[dict[str, PackedLinear]]:
    """Path -> linear in the order of calls, for each input of several linears whose weights can lie in one tensor."""
    calls = Counter(path for path, *_ in reads)
    found: dict[tuple[Any, ...], dict[str, PackedLinear]] = {}
    for path, linear, x, version in reads:  # which hold every x, so that no two have one id
        if calls[path] == 1:
            layout = linear.words.shape[1:], linear.scale.shape[1:], linear.scale.dtype, linear.words.device
            found.setdefault((id(x), version, *layout), {})[path] = linear
    return [readers for readers in found.values() if len(readers) > 1]


def _holder(model: nn.Module, paths: list[str]) -> nn.Module:
    """The innermost module that holds all of `paths` and is one to be called, which a list of modules is not."""
    levels = zip(*(path.split(".")[:-1] for path in paths), strict=False)
    parents = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, levels)]
    while type(model.get_submodule(".".join(parents))).forward is nn.Module.forward and parents:
        parents = parents[:-1]
    return model.get_submodule(".".join(parents))
