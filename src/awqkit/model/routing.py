"""Which expert meets which token: telling a model what to choose, and following rows that were picked out.

Routers choose by a top-k over as many scores as there are experts; whoever does it otherwise is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_TOPK = {torch.topk, Tensor.topk}
_PICK = {Tensor.__getitem__, torch.index_select, Tensor.index_select}
Chooser = Callable[[int, int, int], Tensor]  # tokens, experts of each, experts -> which, `[tokens, experts of each]`


class ChosenExperts(TorchFunctionMode):
    """While active, a top-k over the last of a tensor's dimensions chooses what `chooser` says, where it is a router's.

    counts: how many experts there may be.
    """

    def __init__(self, counts: Collection[int], chooser: Chooser) -> None:
        super().__init__()
        self._counts, self._chooser = counts, chooser

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in _TOPK and args and args[0].shape[-1] in self._counts:
            scores, k = args[0], kwargs.get("k", args[1] if len(args) > 1 else None)
            dim = kwargs.get("dim", args[2] if len(args) > 2 else -1)
            if isinstance(k, int) and dim in (-1, scores.dim() - 1):
                experts = scores.shape[-1]
                chosen = self._chooser(scores[..., 0].numel(), k, experts).to(scores.device)
                chosen = chosen.reshape(*scores.shape[:-1], k)
                return torch.return_types.topk((scores.gather(-1, chosen), chosen))
        return function(*args, **kwargs)


def spread(tokens: int, k: int, experts: int) -> Tensor:
    """The next `k` experts for every token, so that few tokens reach them all."""
    return (torch.arange(tokens).unsqueeze(1) * k + torch.arange(k)) % experts


def run_with_all_experts(run: Callable[[], object], counts: Collection[int]) -> None:
    """Run often enough that every expert meets every token; once, as it is, where no router chooses by a top-k."""
    first, experts = 0, 1
    while first < experts:
        asked: list[tuple[int, int]] = []

        def next_ones(tokens: int, k: int, experts: int, first: int = first, asked: list = asked) -> Tensor:
            asked.append((k, experts))
            return ((first + torch.arange(k)) % experts).expand(tokens, k)

        with ChosenExperts(counts, next_ones):
            run()
        if not asked:
            return
        first, experts = first + asked[0][0], asked[0][1]


class PickedRows(TorchFunctionMode):
    """While active, remembers which rows of a tensor the last rows that were picked out of one are."""

    def __init__(self) -> None:
        super().__init__()
        self._picked: Tensor | None = None
        self._rows: Tensor | None = None

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _PICK and isinstance(result, Tensor) and result.dim() == 2:
            rows = args[-1][0] if isinstance(args[-1], tuple) and args[-1] else args[-1]
            if isinstance(rows, Tensor) and rows.dim() == 1 and rows.dtype == torch.int64:
                self._picked, self._rows = result, rows
        return result

    def rows_of(self, picked: Tensor) -> Tensor | None:
        """The row numbers `[n]` of what was picked last, if it is `picked`."""
        if self._picked is None or self._picked.data_ptr() != picked.data_ptr() or len(picked) != len(self._rows):
            return None
        return self._rows
