"""What is kept of a linear's input: enough for every method, small enough to keep for a whole block.

    gram = Σ_t x_t x_tᵀ     H = E[x xᵀ] = gram / token_count

`gram` is the H of the GPTQ paper without its factor 2 (Frantar 2022, section 3.2). It is accumulated in float32:
products with a bfloat16 *output* are not positive definite any more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_GRAM_TILE = 256  # columns a step; only tiles on and above the diagonal are multiplied, the rest is mirrored


@dataclass(frozen=True, slots=True)
class Statistics:
    """Sums over the tokens that one linear input was seen with; mergeable in any order.

    token_count: tokens seen. abs_sum, max_abs: `[in]` float32, units of x. gram: `[in, in]` float32, a sum.
    While accumulating only the tiles of `gram` on and above the diagonal are filled: `finished` mirrors them.
    """

    token_count: int
    abs_sum: Tensor
    max_abs: Tensor
    gram: Tensor

    @property
    def mean_abs(self) -> Tensor:
        """E|x| per channel, `[in]`: s_X of the AWQ paper (Lin 2023, section 3.2)."""
        return self.abs_sum / max(self.token_count, 1)


def empty_statistics(num_channels: int, device: torch.device | str = "cpu") -> Statistics:
    """Statistics of no tokens for an input of `num_channels`."""
    zeros = torch.zeros(num_channels, device=device)
    return Statistics(0, zeros, zeros.clone(), torch.zeros(num_channels, num_channels, device=device))


def accumulate_(statistics: Statistics, inputs: Tensor, mask: Tensor | None = None) -> Statistics:
    """The statistics with `inputs` added; the buffers of `statistics` are reused and must not be read afterwards.

    inputs: `[..., in]` of any float dtype, summed in float32. mask: bool `[...]`, True where a token counts
    (padding is False), or None where all count.
    """
    tokens = inputs.reshape(-1, inputs.shape[-1]).to(torch.float32)
    if mask is not None:
        tokens = tokens[mask.reshape(-1)]
    if tokens.shape[0] == 0:
        return statistics
    absolute = tokens.abs()
    statistics.abs_sum.add_(absolute.sum(dim=0))
    torch.maximum(statistics.max_abs, absolute.amax(dim=0), out=statistics.max_abs)
    for start in range(0, tokens.shape[1], _GRAM_TILE):
        rows = tokens[:, start : start + _GRAM_TILE]
        statistics.gram[start : start + _GRAM_TILE, start:].addmm_(rows.t(), tokens[:, start:])
    return Statistics(statistics.token_count + tokens.shape[0], statistics.abs_sum, statistics.max_abs, statistics.gram)


def finished(statistics: Statistics) -> Statistics:
    """The same statistics with a full, symmetric gram."""
    upper = statistics.gram.triu()
    gram = upper + upper.triu(1).t()
    return Statistics(statistics.token_count, statistics.abs_sum, statistics.max_abs, gram)


def merged(first: Statistics, second: Statistics) -> Statistics:
    """Statistics of the tokens of both."""
    return Statistics(
        first.token_count + second.token_count,
        first.abs_sum + second.abs_sum,
        torch.maximum(first.max_abs, second.max_abs),
        first.gram + second.gram,
    )


def second_moment(statistics: Statistics) -> Tensor:
    """H = E[x xᵀ], `[in, in]` float32, of finished statistics."""
    return statistics.gram / max(statistics.token_count, 1)
