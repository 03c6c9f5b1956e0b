"""What is kept of a linear's input: enough for every method, small enough to keep for a whole block.

    gram = Σ_t ω_t x_t x_tᵀ     H = E[x xᵀ] = gram / Σ_t ω_t     ω_t = 1 unless tokens are weighted

`gram` is the H of the GPTQ paper without its factor 2 (Frantar 2022, section 3.2). It is accumulated in float32:
products with a bfloat16 *output* are not positive definite any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from awqkit.kernels.gram import add_gram_, add_product_
from awqkit.numerics.output_error import diagonal_blocks, moment_diagonal

_SAMPLE_TOKENS = 128
_TILE = 1024  # channels of a gram that are mirrored at once


@dataclass(frozen=True, slots=True)
class Gram:
    """gram: `[in, in]` float32, Σ_t ω_t x_t x_tᵀ. weight_sum: Σ_t ω_t, the number of tokens where they count alike.

    Or `[groups, group_size, group_size]`, its blocks on the diagonal, where nobody asks for more. While accumulating
    only the tiles of a whole `gram` on and above the diagonal are filled: `mirrored_` fills the others.
    """

    weight_sum: float
    gram: Tensor


@dataclass(frozen=True, slots=True)
class Statistics:
    """Sums over the tokens that one linear input was seen with; mergeable in any order.

    token_count: tokens seen; weight_sum: the sum of their weights, the same number where tokens count alike.
    abs_sum, max_abs: `[in]` float32, units of x. sample: `[≤ 128, in]` float32, some of the tokens themselves, or None
    where nobody asks for them.
    gram: `[in, in]` float32 or its blocks, a weighted sum; while accumulating as in `Gram`, until `finished`.
    """

    token_count: int
    weight_sum: float
    abs_sum: Tensor
    max_abs: Tensor
    sample: Tensor | None
    gram: Tensor

    @property
    def mean_abs(self) -> Tensor:
        """E|x| per channel, `[in]`: s_X of the AWQ paper (Lin 2023, section 3.2)."""
        return self.abs_sum / max(self.token_count, 1)


def empty_gram(num_channels: int, device: torch.device | str = "cpu") -> Gram:
    """The sum over no tokens for an input of `num_channels`."""
    return Gram(0.0, torch.zeros(num_channels, num_channels, device=device))


def accumulate_gram_(
    summed: Gram, inputs: Tensor, mask: Tensor | None = None, token_weight: Tensor | None = None
) -> Gram:
    """As `accumulate_`, the gram alone."""
    tokens, weight_sum = real_tokens(inputs, mask), None
    weighted = tokens
    if token_weight is not None:
        weights = real_tokens(token_weight.unsqueeze(-1), mask)
        weighted, weight_sum = tokens * weights, float(weights.sum())
    if summed.gram.dim() == 3:
        shape = (len(tokens), *summed.gram.shape[:2])
        summed.gram.baddbmm_(weighted.reshape(shape).permute(1, 2, 0), tokens.reshape(shape).transpose(0, 1))
    else:
        add_gram_(summed.gram, weighted, tokens)
    return Gram(summed.weight_sum + (float(tokens.shape[0]) if weight_sum is None else weight_sum), summed.gram)


def mirrored_(summed: Gram) -> Gram:
    """The same with a full, symmetric gram, made in its own buffer: a second one of that size may not fit."""
    gram = summed.gram
    for start in range(0, gram.shape[0] if gram.dim() == 2 else 0, _TILE):
        tile, later = slice(start, start + _TILE), slice(start + _TILE, None)
        upper = gram[tile, tile].triu()
        gram[tile, tile] = upper + upper.triu(1).t()
        gram[later, tile] = gram[tile, later].t()
    return summed


def empty_statistics(
    num_channels: int, device: torch.device | str = "cpu", group_size: int | None = None, *, sampled: bool = True
) -> Statistics:
    """Statistics of no tokens for an input of `num_channels`; group_size: for the gram's blocks of that size alone.

    sampled: whether some tokens are to be kept.
    """
    abs_sum, max_abs = torch.zeros(2, num_channels, device=device).unbind()
    none = torch.empty(0, num_channels, device=device) if sampled else None
    if group_size is None:
        gram = empty_gram(num_channels, device).gram
    else:
        gram = torch.zeros(num_channels // group_size, group_size, group_size, device=device)
    return Statistics(0, 0.0, abs_sum, max_abs, none, gram)


def accumulate_(
    statistics: Statistics, inputs: Tensor, mask: Tensor | None = None, token_weight: Tensor | None = None
) -> Statistics:
    """The statistics with `inputs` added; the buffers of `statistics` are reused and must not be read afterwards.

    inputs: `[..., in]` of any float dtype, summed in float32. mask: bool `[...]`, True where a token counts
    (padding is False), or None where all count. token_weight: `[...]` float32 ≥ 0, what a token's error costs in the
    gram, or None where all cost the same; means of |x| stay unweighted.
    """
    tokens = real_tokens(inputs, mask).to(torch.float32)
    if tokens.shape[0] == 0:
        return statistics
    absolute = tokens.abs()
    abs_sum, max_abs = absolute.sum(dim=0), absolute.amax(dim=0)
    if statistics.token_count:
        abs_sum, max_abs = statistics.abs_sum.add_(abs_sum), torch.maximum(statistics.max_abs, max_abs)
    weights = None if token_weight is None else real_tokens(token_weight.unsqueeze(-1), mask).squeeze(-1)
    summed = accumulate_gram_(Gram(statistics.weight_sum, statistics.gram), tokens, None, weights)
    return Statistics(
        statistics.token_count + tokens.shape[0],
        summed.weight_sum,
        abs_sum,
        max_abs,
        _sampled(statistics.sample, tokens),
        summed.gram,
    )


def _sampled(sample: Tensor | None, tokens: Tensor) -> Tensor | None:
    """The sample, if there is to be one, filled up with tokens evenly spaced over a batch."""
    wanted = 0 if sample is None else _SAMPLE_TOKENS - sample.shape[0]
    if wanted <= 0:
        return sample
    return torch.cat([sample, tokens[:: max(1, -(-tokens.shape[0] // wanted))]])


def real_tokens(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """`[..., in]` as `[tokens, in]`, padding (mask False) left out."""
    tokens = inputs.reshape(-1, inputs.shape[-1])
    return tokens if mask is None else tokens[mask.reshape(-1)]


def finished(statistics: Statistics) -> Statistics:
    """The same statistics with a full, symmetric gram, made in its own buffer."""
    return replace(statistics, gram=mirrored_(Gram(statistics.weight_sum, statistics.gram)).gram)


def added_gram_(first: Gram, second: Gram) -> Gram:
    """The sum of two, both as they are while accumulating or both mirrored; the first one's buffer is reused.

    Where the first was set aside on the host, the second's is.
    """
    return Gram(first.weight_sum + second.weight_sum, _plus_(first.gram, second.gram))


def _plus_(first: Tensor, second: Tensor) -> Tensor:
    if first.device == second.device:
        return first.add_(second)
    for start in range(0, len(second), _TILE):  # a piece at a time: there is no room for both
        rows = slice(start, start + _TILE)
        second[rows].add_(first[rows].to(second.device))
    return second


def added_(first: Statistics, second: Statistics) -> Statistics:
    """The same of whole Statistics. The samples lie one after the other: `sampled_evenly` makes them short again."""
    summed = added_gram_(Gram(first.weight_sum, first.gram), Gram(second.weight_sum, second.gram))
    return Statistics(
        first.token_count + second.token_count,
        summed.weight_sum,
        first.abs_sum.add_(second.abs_sum),
        torch.maximum(first.max_abs, second.max_abs),
        joined_samples([first.sample, second.sample]),
        summed.gram,
    )


def all_added_(first: Mapping[str, Statistics], second: Mapping[str, Statistics]) -> dict[str, Statistics]:
    """`added_` by name, of all of them at once where they lie on one device; both ones' buffers may be reused."""
    pairs = [(found, second[name]) for name, found in first.items()]
    if any(found.gram.device != other.gram.device for found, other in pairs):
        return {name: added_(found, second[name]) for name, found in first.items()}
    for values in ("gram", "abs_sum"):
        torch._foreach_add_(
            [getattr(found, values) for found, _ in pairs], [getattr(each, values) for _, each in pairs]
        )
    torch._foreach_maximum_([found.max_abs for found, _ in pairs], [other.max_abs for _, other in pairs])
    return {
        name: replace(
            found,
            token_count=found.token_count + other.token_count,
            weight_sum=found.weight_sum + other.weight_sum,
            sample=joined_samples([found.sample, other.sample]),
        )
        for name, (found, other) in zip(first, pairs, strict=True)
    }


def joined_samples(samples: Sequence[Tensor | None]) -> Tensor | None:
    """One after the other; None where there are none."""
    there = [sample for sample in samples if sample is not None]
    return torch.cat(there) if there else None


def sampled_evenly(statistics: Statistics, parts: int) -> Statistics:
    """With so few tokens in the sample, evenly spaced, that the samples of `parts` such parts are one together."""
    if statistics.sample is None:
        return statistics
    wanted = -(-_SAMPLE_TOKENS // parts)
    return replace(statistics, sample=statistics.sample[:: max(1, -(-len(statistics.sample) // wanted))])


def pooled(parts: Sequence[Statistics]) -> Statistics:
    """Statistics of the tokens of all parts, finished as they are; samples are taken evenly."""
    gram = torch.zeros_like(parts[0].gram)
    for part in parts:
        gram += part.gram
    each = -(-_SAMPLE_TOKENS // len(parts))
    sample = joined_samples([None if part.sample is None else part.sample[:each] for part in parts])
    return Statistics(
        sum(part.token_count for part in parts),
        sum(part.weight_sum for part in parts),
        torch.stack([part.abs_sum for part in parts]).sum(dim=0),
        torch.stack([part.max_abs for part in parts]).amax(dim=0),
        None if sample is None else sample[:_SAMPLE_TOKENS],
        gram,
    )


def shrunk(statistics: Statistics, prior: Tensor, enough: int) -> Statistics:
    """Finished statistics of few tokens drawn towards `prior`, an H like their own, by as much as tokens lack.

        H' = λ H + (1 − λ) prior,   λ = min(1, tokens ÷ enough)

    The sampling error of H is in proportion to √(channels ÷ tokens), so a share of the tokens asked for earns H the
    same share of the say (linear shrinkage, Ledoit and Wolf 2004, with a fixed λ).
    """
    share = min(1.0, statistics.token_count / max(enough, 1))
    if share == 1.0:
        return statistics
    weight_sum = statistics.weight_sum or 1.0
    moment = share * second_moment(statistics) + (1.0 - share) * prior
    abs_sum = statistics.abs_sum if statistics.token_count else moment_diagonal(prior).sqrt()
    return replace(statistics, weight_sum=weight_sum, abs_sum=abs_sum, gram=moment * weight_sum)


def second_moment(summed: Statistics | Gram) -> Tensor:
    """H = E[x xᵀ], `[in, in]` or its blocks, float32, of finished statistics or a mirrored gram."""
    return summed.gram / (summed.weight_sum or 1.0)


def whole_groups(num_channels: int, group_size: int | None) -> int | None:
    """The group size where whole groups of it make up the channels, else None."""
    return group_size if group_size is not None and group_size > 0 and num_channels % group_size == 0 else None


def in_blocks(statistics: Statistics, group_size: int) -> Statistics:
    """Finished statistics with no more of the gram than its blocks on the diagonal, where they tile it."""
    if whole_groups(statistics.gram.shape[-1], group_size) is None or statistics.gram.dim() == 3:
        return statistics
    return replace(statistics, gram=diagonal_blocks(statistics.gram, group_size))


@dataclass(frozen=True, slots=True)
class PairedStatistics:
    """What one linear input is on both streams, token by token.

    quantized: of x̂, the input after everything before it was quantized. cross_gram: Σ_t ω_t x_t x̂_tᵀ `[in, in]`
    float32, x of the original stream along the rows.
    """

    quantized: Gram
    cross_gram: Tensor


def empty_paired(num_channels: int, device: torch.device | str = "cpu") -> PairedStatistics:
    """Statistics of no tokens on both streams."""
    quantized = empty_gram(num_channels, device)
    return PairedStatistics(quantized, torch.zeros_like(quantized.gram))


def accumulate_paired_(
    paired: PairedStatistics,
    original: Tensor,
    quantized: Tensor,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
) -> PairedStatistics:
    """As `accumulate_`, for the same tokens' inputs `[..., in]` on the original and on the quantized stream."""
    first, second, weights = real_tokens(original, mask), real_tokens(quantized, mask), None
    if token_weight is not None:
        weights = real_tokens(token_weight.unsqueeze(-1), mask)
        first, weights = first * weights, weights.squeeze(-1)
    add_product_(paired.cross_gram, first, second)
    return replace(paired, quantized=accumulate_gram_(paired.quantized, second, None, weights))


def added_paired_(first: PairedStatistics, second: PairedStatistics) -> PairedStatistics:
    """The sum of two, while accumulating, as `added_gram_` adds."""
    together = added_gram_(first.quantized, second.quantized)
    return PairedStatistics(together, _plus_(first.cross_gram, second.cross_gram))


def finished_paired(paired: PairedStatistics) -> PairedStatistics:
    """The same with a full, symmetric gram of the quantized stream, made in its own buffer."""
    return replace(paired, quantized=mirrored_(paired.quantized))


def cross_moment(paired: PairedStatistics) -> Tensor:
    """C = E[x x̂ᵀ], `[in, in]` float32."""
    return paired.cross_gram / (paired.quantized.weight_sum or 1.0)


def moments_(paired: PairedStatistics) -> tuple[Tensor, Tensor]:
    """Ĥ and C, `[in, in]` float32, in the buffers of `paired`, which must not be read afterwards."""
    weight_sum = paired.quantized.weight_sum or 1.0
    return paired.quantized.gram.div_(weight_sum), paired.cross_gram.div_(weight_sum)
