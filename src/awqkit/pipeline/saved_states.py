"""What travels with hidden states, taken apart into named tensors and a JSON value, and put together again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from awqkit.model.block_calls import Carried


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
