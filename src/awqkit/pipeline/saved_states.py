"""What travels with hidden states, taken apart into named tensors and a JSON value, and put together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from awqkit.model.block_calls import Carried, leaves, mapped


def taken_apart(carried: Carried, tensors: dict[str, Tensor]) -> Any:
    """JSON that says what `carried` is made of; its tensors are added to `tensors` under new names."""
    if isinstance(carried, Tensor):
        name = f"beside {len(tensors)}"
        tensors[name] = carried
        return {"tensor": name}
    if isinstance(carried, (tuple, list)):
        return {"tuple" if isinstance(carried, tuple) else "list": [taken_apart(each, tensors) for each in carried]}
    if isinstance(carried, dict):
        return {"dict": [[key, taken_apart(value, tensors)] for key, value in carried.items()]}
    return None


def put_together(form: Any, tensors: Mapping[str, Tensor]) -> Carried:
    """What `taken_apart` gave `form` for."""
    if form is None:
        return None
    ((kind, value),) = form.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: put_together(each, tensors) for key, each in value}
    parts = [put_together(each, tensors) for each in value]
    return tuple(parts) if kind == "tuple" else parts


def rows_of_pieces(pieces: Sequence[tuple[int, Carried]], rows: slice) -> Carried:
    """What travels with some rows, of pieces that begin at the row given with each and may be cut otherwise."""
    found: list[tuple[int, list[Tensor]]] = []
    for start, carried in sorted(pieces, key=lambda piece: piece[0]):
        tensors = leaves(carried)
        if tensors and start < rows.stop and start + len(tensors[0]) > rows.start:
            found.append((start, tensors))
    if not found:
        return pieces[0][1]  # nothing that has rows
    cut = [
        torch.cat([tensors[number][max(rows.start - start, 0) : rows.stop - start] for start, tensors in found])
        for number in range(len(found[0][1]))
    ]
    following = iter(cut)
    return mapped(pieces[0][1], lambda _: next(following))
