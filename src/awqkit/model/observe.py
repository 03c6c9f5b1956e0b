"""Watching a block compute: which linear reads which input, what goes in and what comes out.

A linear call is recognised at function level, by the storage of its weight, so it does not matter which module
class made it. Nothing is added to anybody's module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

TRANSPOSED = "ᵀ"  # after the name of a parameter that is [in, out]; no parameter is called so

_PRODUCTS = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}  # x Wᵀ, as some models write it
_CALLS = {F.linear, torch.addmm, *_PRODUCTS}
BeforeLinear = Callable[[str, Tensor], "Tensor | None"]
AfterLinear = Callable[[str, Tensor], "Tensor | None"]
WeightOf = Callable[[str], "Tensor | None"]


class LinearWatch(TorchFunctionMode):
    """While active, `before(name, inputs)` and `after(name, outputs)` are called around every watched linear.

    weights: parameter name -> the tensor to recognise. Either callback may return a tensor that takes the place of
    the inputs (outputs), or None to leave them. weight_of(name), asked after `before`: the weight `[out, in]` to
    compute with, or None for the block's own.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        before: BeforeLinear | None = None,
        after: AfterLinear | None = None,
        weight_of: WeightOf | None = None,
    ) -> None:
        super().__init__()
        self._names = {_key(weight): name for name, weight in weights.items()}
        self._before, self._after, self._weight_of = before, after, weight_of

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function not in _CALLS:  # first, since almost none is
            return function(*args, **kwargs) if kwargs else function(*args)
        kwargs = kwargs or {}
        if function is F.linear:
            inputs, weight, *rest = (*args, *(kwargs[key] for key in ("input", "weight", "bias") if key in kwargs))
        elif function in _PRODUCTS and len(args) == 2 and isinstance(args[1], Tensor) and args[1].dim() == 2:
            inputs, weight, rest = args[0], args[1].t(), []
        elif function is torch.addmm and len(args) == 3 and args[0].dim() == 1 and not kwargs:
            inputs, weight, rest = args[1], args[2].t(), [args[0]]
        else:
            return function(*args, **kwargs)
        name = self._names.get(_key(weight))
        if name is None:
            return function(*args, **kwargs)
        if self._before is not None:
            replaced = self._before(name, inputs)
            inputs = inputs if replaced is None else replaced
        if self._weight_of is not None:
            replaced = self._weight_of(name)
            weight = weight if replaced is None else replaced
        outputs = F.linear(inputs, weight, *rest)
        if self._after is not None:
            replaced = self._after(name, outputs)
            outputs = outputs if replaced is None else replaced
        return outputs


def _key(weight: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return weight.data_ptr(), tuple(weight.shape), weight.stride()


def both_ways(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The matrices as they are and, under their names with `TRANSPOSED`, turned: a weight may be `[in, out]`."""
    return {**weights, **{name + TRANSPOSED: weight.t() for name, weight in weights.items()}}
