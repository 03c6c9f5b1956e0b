"""One fold: the channel scale that its consumers share, searched jointly over all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awqkit.decisions import ALPHA_POINTS, AlphaSummary
from awqkit.methods.evidence import Evidence, Readers
from awqkit.methods.linear import QuantizedLinear, ScaledWeight, group_weights, plain_weight
from awqkit.methods.plan import LinearPlan
from awqkit.numerics.activations import token_rounding_error
from awqkit.numerics.channel_scale import (
    Candidate,
    best_per_unit,
    candidates,
    rounding_errors,
    search_units,
    smooth_candidates,
    tied_mean,
)
from awqkit.numerics.histogram import counts_at
from awqkit.numerics.output_error import moment_diagonal, summed_error, weighted_error
from awqkit.numerics.statistics import Statistics, second_moment


@dataclass(frozen=True, slots=True)
class ChannelScale:
    """A searched s per *producer* channel, `[producer channels]` float32, and how the search ended."""

    per_channel: Tensor
    alpha: AlphaSummary


@dataclass(frozen=True, slots=True)
class ScaleChoices:
    """The Recipe's part of a search: see `Recipe.channel_scale`, `scale_families`, `importance`, `alpha_search`."""

    channel_scale: str
    families: tuple[str, ...]
    importance: str
    alpha_search: str
    smooth_alpha: float | None


@dataclass(frozen=True, slots=True)
class Tied:
    """Which producer channel every input channel reads: `channel_of` `[in]` int64, −1 where s must stay 1."""

    channel_of: Tensor
    num_producer_channels: int

    def mean(self, values: Tensor) -> Tensor:
        """`values` `[in]` averaged over the input channels of one producer channel."""
        return tied_mean(values, self.channel_of, self.num_producer_channels)

    def largest(self, values: Tensor) -> Tensor:
        """The largest of `values` `[in]` ≥ 0 over the input channels of one producer channel; −1 gives 1."""
        tied = self.channel_of >= 0
        top = torch.zeros(self.num_producer_channels, device=values.device)
        top.scatter_reduce_(0, self.channel_of[tied], values[tied], "amax")
        return torch.where(tied, top[self.channel_of.clamp(min=0)], torch.ones_like(values))


def _conditional(statistics: Statistics, evidence: Evidence) -> Tensor:
    assert evidence.metric is not None
    return evidence.metric.variance


IMPORTANCE: dict[str, Callable[[Statistics, Evidence], Tensor]] = {
    "square": lambda statistics, evidence: moment_diagonal(second_moment(statistics)),
    "mean-abs": lambda statistics, evidence: statistics.mean_abs.square(),
    "conditional": _conditional,
}


def search_channel_scale(
    readers: Readers, statistics: Statistics, evidence: Evidence, tied: Tied, plan: LinearPlan, choices: ScaleChoices
) -> ChannelScale:
    """The s that minimises the consumers' summed error.

    readers: the consumers, unscaled. statistics, evidence: of their input on the original stream. plan: any consumer's
    (they share a grid's choices).
    """
    search = _search_smoothing if choices.channel_scale == "smooth" else _search_families
    return search(readers, statistics, evidence, tied, plan, choices)


def _search_families(
    readers: Readers, statistics: Statistics, evidence: Evidence, tied: Tied, plan: LinearPlan, choices: ScaleChoices
) -> ChannelScale:
    """AWQ and what measured better: each search unit takes the best α of the best family."""
    importance = tied.mean(IMPORTANCE[choices.importance](statistics, evidence))
    column_rms = tied.mean(readers.column_energy).sqrt()
    by_layer = choices.alpha_search == "layer"
    unit_of_group = search_units(tied.channel_of, tied.num_producer_channels, plan.group_size)
    if by_layer:
        unit_of_group = torch.zeros_like(unit_of_group)
    unit_of_channel = unit_of_group.repeat_interleave(plan.group_size)
    tried = candidates(importance, column_rms, tied.channel_of, unit_of_channel, choices.families)
    on_full_moment = by_layer and plan.error_weight == "moment"
    errors = rounding_errors(
        torch.cat(readers.weights),
        group_weights(evidence.moment, evidence.metric, plan),
        readers.row_weight,
        tried,
        group_size=plan.group_size,
        full_moment=evidence.moment if on_full_moment else None,
        **plan.grid_choices,
    )
    best = best_per_unit(errors, unit_of_group[:1] if on_full_moment else unit_of_group)
    return _chosen(tried, best, unit_of_channel, tied)


def _search_smoothing(
    readers: Readers, statistics: Statistics, evidence: Evidence, tied: Tied, plan: LinearPlan, choices: ScaleChoices
) -> ChannelScale:
    """SmoothQuant (Xiao 2022, section 4): one α per fold, the given one, or the best of 21 for weights and inputs."""
    weight = torch.cat(readers.weights)
    tried = smooth_candidates(
        tied.largest(statistics.max_abs),
        tied.largest(weight.abs().amax(dim=0)),
        tied.channel_of,
        choices.smooth_alpha,
    )
    unit_of_channel = torch.zeros_like(tied.channel_of)
    if choices.smooth_alpha is not None:
        return _chosen(tried, unit_of_channel[:1], unit_of_channel, tied)
    errors = rounding_errors(
        weight,
        group_weights(evidence.moment, evidence.metric, plan),
        readers.row_weight,
        tried,
        group_size=plan.group_size,
        full_moment=evidence.moment,
        **plan.grid_choices,
    )
    for index, candidate in enumerate(tried):
        errors[index] += token_rounding_error(weight, statistics.sample, candidate.channel_scale, readers.row_weight)
    return _chosen(tried, best_per_unit(errors, unit_of_channel[:1]), unit_of_channel, tied)


def _chosen(tried: Sequence[Candidate], best: Tensor, unit_of_channel: Tensor, tied: Tied) -> ChannelScale:
    scale = torch.stack([candidate.channel_scale for candidate in tried])
    chosen = scale.gather(0, best[unit_of_channel].unsqueeze(0)).squeeze(0)
    # a place more, which −1 stands for
    per_channel = torch.ones(tied.num_producer_channels + 1, device=scale.device)
    per_channel = per_channel.scatter_(0, tied.channel_of % len(per_channel), chosen)[:-1]
    return ChannelScale(per_channel, _summary(tried, best, per_channel))


def consumer_scale(per_channel: Tensor, channel_of: Tensor) -> Tensor:
    """s on a consumer's input channels, `[in]`: that of the producer channel, 1 where `channel_of` is −1."""
    scale = per_channel[channel_of.clamp(min=0)]
    return torch.where(channel_of >= 0, scale, torch.ones_like(scale))


def _summary(tried: Sequence[Candidate], best: Tensor, per_channel: Tensor) -> AlphaSummary:
    won = [tried[index] for index in best.tolist()]
    scale_min, scale_max = torch.stack(per_channel.aminmax()).tolist()
    scaled = [candidate for candidate in won if candidate.family != "identity"]
    alphas = sorted(candidate.alpha for candidate in scaled)
    families = {
        name: sum(candidate.family == name for candidate in scaled) for name in sorted({c.family for c in scaled})
    }
    return AlphaSummary(
        num_units=len(won),
        num_identity=len(won) - len(scaled),
        families=families,
        alpha_min=alphas[0] if alphas else None,
        alpha_median=alphas[len(alphas) // 2] if alphas else None,
        alpha_max=alphas[-1] if alphas else None,
        scale_min=scale_min,
        scale_max=scale_max,
        counts=counts_at(torch.tensor(alphas), ALPHA_POINTS),
    )


def scale_costs(readers: Readers, evidence: Evidence, scales: Sequence[Tensor], plan: LinearPlan) -> list[float]:
    """What plain rounding of the readers costs under each s `[in]`, as the search of scales measures it."""
    errors = rounding_errors(
        torch.cat(readers.weights),
        group_weights(evidence.moment, evidence.metric, plan),
        readers.row_weight,
        [Candidate("given", 0.0, scale) for scale in scales],
        group_size=plan.group_size,
        **plan.grid_choices,
    )
    return errors.sum(dim=1).tolist()


def storage_cost(
    weight: Tensor, channel_scale: Tensor, moment: Tensor, row_weight: Tensor, stored_dtype: torch.dtype
) -> float:
    """What a linear `[out, in]` in full precision loses when its columns times s are rounded to the file's dtype."""
    stored = (weight * channel_scale).to(stored_dtype).to(torch.float32)
    return weighted_error(stored / channel_scale - weight, moment, row_weight)


def fold_errors(
    consumers: Sequence[QuantizedLinear],
    scaled: Sequence[ScaledWeight],
    row_weights: Sequence[Tensor],
    moments: Sequence[Tensor],
) -> tuple[float, float]:
    """The consumers' summed, row-weighted errors on H: of plain rounding at s = 1, and of what was chosen.

    moments: H (as `numerics.output_error` takes it) of the input that each gets, in the original's units. Both are
    measured from the weight aimed at; the rows' own division r is the same on both sides.
    """
    plain, chosen = 0.0, 0.0
    for linear, weight, row_weight, moment in zip(consumers, scaled, row_weights, moments, strict=True):
        both = (plain_weight(weight, linear.plan), linear.restored)
        errors = torch.stack([summed_error(each - weight.target, moment, row_weight) for each in both]).tolist()
        plain, chosen = plain + errors[0], chosen + errors[1]
    return plain, chosen


def smoothing_errors(
    scaled: Sequence[ScaledWeight], row_weights: Sequence[Tensor], samples: Sequence[Tensor]
) -> tuple[float, float]:
    """What rounding the input per token adds to `fold_errors`: at s = 1, and at the chosen s.

    samples: tokens of what each reads, `[tokens, in]`.
    """
    plain, chosen = 0.0, 0.0
    for weight, row_weight, tokens in zip(scaled, row_weights, samples, strict=True):
        ones = torch.ones_like(weight.channel_scale)
        plain += token_rounding_error(weight.original, tokens, ones, row_weight)
        chosen += token_rounding_error(weight.original, tokens, weight.channel_scale, row_weight)
    return plain, chosen
