"""One fold: the channel scale that its consumers share, searched jointly over all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from awqkit.decisions import ALPHA_POINTS, AlphaSummary
from awqkit.kernels.replay import Replays, begun
from awqkit.methods.evidence import Evidence, Readers
from awqkit.methods.linear import ScaledWeight, group_weights
from awqkit.methods.plan import LinearPlan
from awqkit.numerics.activations import token_rounding_error
from awqkit.numerics.channel_scale import (
    IDENTITY,
    Candidate,
    best_per_unit,
    candidates,
    rounding_errors,
    search_units,
    smooth_candidates,
    tied_mean,
    tries,
)
from awqkit.numerics.histogram import counts_at
from awqkit.numerics.output_error import moment_diagonal, weighted_error
from awqkit.numerics.statistics import Statistics


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
class Units:
    """Which channels take one candidate together: the number of the unit of every group `[groups]` and of every input
    channel `[in]`, int64, and how many units there are.
    """

    of_group: Tensor
    of_channel: Tensor
    count: int


@dataclass(frozen=True, slots=True)
class Tied:
    """Which producer channel every input channel reads: `channel_of` `[in]` int64, −1 where s must stay 1.

    What follows from it alone is found once, for all blocks of a kind.
    """

    channel_of: Tensor
    num_producer_channels: int
    _units: dict[tuple[int, bool], Units] = field(default_factory=dict, repr=False, compare=False)
    _in_order: list[bool] = field(default_factory=list, repr=False, compare=False)

    def units(self, group_size: int, *, by_layer: bool = False) -> Units:
        """See `numerics.channel_scale.search_units`; by_layer: all channels are one."""
        key = (group_size, by_layer)
        if key not in self._units:
            of_group = search_units(self.channel_of, self.num_producer_channels, group_size)
            if by_layer:
                of_group = torch.zeros_like(of_group)
            of_channel = of_group.repeat_interleave(group_size)
            self._units[key] = Units(of_group, of_channel, int(of_group.max()) + 1)
        return self._units[key]

    def scale(self, per_channel: Tensor) -> Tensor:
        """`consumer_scale` of s per producer channel; the given tensor itself where channels are read in order."""
        if not self._in_order:
            own = torch.arange(self.num_producer_channels, device=self.channel_of.device)
            self._in_order.append(torch.equal(self.channel_of, own))
        return per_channel if self._in_order[0] else consumer_scale(per_channel, self.channel_of)

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
    "square": lambda statistics, evidence: moment_diagonal(statistics.gram) / (statistics.weight_sum or 1.0),
    "mean-abs": lambda statistics, evidence: statistics.mean_abs.square(),
    "conditional": _conditional,
}


def begin_channel_scale(
    readers: Readers,
    statistics: Statistics,
    evidence: Evidence,
    tied: Tied,
    plan: LinearPlan,
    choices: ScaleChoices,
    replays: Replays | None = None,
) -> Callable[[], ChannelScale]:
    """The s that minimises the consumers' summed error, for whoever asks.

    readers: the consumers, unscaled. statistics, evidence: of their input on the original stream. plan: any consumer's
    (they share a grid's choices). replays: by which the search may be replayed.
    """
    if choices.channel_scale == "smooth":
        smoothing = _search_smoothing(readers, statistics, evidence, tied, plan, choices)
        return lambda: smoothing
    importance = IMPORTANCE[choices.importance](statistics, evidence)
    units = tied.units(plan.group_size, by_layer=choices.alpha_search == "layer")
    given = (readers, importance, evidence.bare, tied.channel_of, tied.num_producer_channels, units)
    found = begun(replays, best_of_families, *given, plan.nameless, choices)
    return lambda: _read(tries(choices.families), found())


def best_of_families(
    readers: Readers,
    importance: Tensor,
    evidence: Evidence,
    channel_of: Tensor,
    num_producer_channels: int,
    units: Units,
    plan: LinearPlan,
    choices: ScaleChoices,
) -> SearchedScale:
    """AWQ and what measured better: each search unit takes the best α of the best family. Nobody looks at it yet, and
    nothing waits for the device. importance: `[in]`. Otherwise as `search_channel_scale` and `Tied` have it.
    """
    energies = [tied_mean(each, channel_of, num_producer_channels) for each in (importance, readers.column_energy)]
    tried = candidates(energies[0], energies[1].sqrt(), channel_of, units.of_channel, choices.families)
    on_full_moment = choices.alpha_search == "layer" and plan.error_weight == "moment"
    errors = rounding_errors(
        torch.cat(readers.weights),
        group_weights(evidence.moment, evidence.metric, plan),
        readers.row_weight,
        tried,
        group_size=plan.group_size,
        full_moment=evidence.moment if on_full_moment else None,
        **plan.grid_choices,
    )
    best = best_per_unit(errors, units.of_group[:1] if on_full_moment else units.of_group, units.count)
    return _searched(tried, best, units.of_channel, channel_of, num_producer_channels)


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
    channels = tied.channel_of, tied.num_producer_channels
    names = [(candidate.family, candidate.alpha) for candidate in tried]
    if choices.smooth_alpha is not None:
        return _read(names, _searched(tried, unit_of_channel[:1], unit_of_channel, *channels))
    errors = rounding_errors(
        weight,
        group_weights(evidence.moment, evidence.metric, plan),
        readers.row_weight,
        tried,
        group_size=plan.group_size,
        full_moment=evidence.moment,
        **plan.grid_choices,
    )
    assert statistics.sample is not None  # `Recipe.looks_at_tokens`
    for index, candidate in enumerate(tried):
        errors[index] += token_rounding_error(weight, statistics.sample, candidate.channel_scale, readers.row_weight)
    best = best_per_unit(errors, unit_of_channel[:1], 1)
    return _read(names, _searched(tried, best, unit_of_channel, *channels))


@dataclass(frozen=True, slots=True)
class SearchedScale:
    """s per producer channel. figures: its extremes, then the number of every unit's best candidate; float64."""

    per_channel: Tensor
    figures: Tensor


def _searched(
    tried: Sequence[Candidate], best: Tensor, unit_of_channel: Tensor, channel_of: Tensor, num_producer_channels: int
) -> SearchedScale:
    scale = torch.stack([candidate.channel_scale for candidate in tried])
    chosen = scale.gather(0, best[unit_of_channel].unsqueeze(0)).squeeze(0)
    # a place more, which −1 stands for
    per_channel = torch.ones(num_producer_channels + 1, device=scale.device)
    per_channel = per_channel.scatter_(0, channel_of % len(per_channel), chosen)[:-1]
    return SearchedScale(per_channel, torch.cat([torch.stack(per_channel.aminmax()).double(), best.double()]))


def consumer_scale(per_channel: Tensor, channel_of: Tensor) -> Tensor:
    """s on a consumer's input channels, `[in]`: that of the producer channel, 1 where `channel_of` is −1."""
    scale = per_channel[channel_of.clamp(min=0)]
    return torch.where(channel_of >= 0, scale, torch.ones_like(scale))


def _read(tried: Sequence[tuple[str, float]], found: SearchedScale) -> ChannelScale:
    """With one look at the device. tried: family and α of every candidate."""
    scale_min, scale_max, *best = found.figures.tolist()
    scaled = [tried[int(index)] for index in best if tried[int(index)][0] != IDENTITY]
    alphas, names = sorted(alpha for _, alpha in scaled), [family for family, _ in scaled]
    families = {name: names.count(name) for name in sorted(set(names))}
    summary = AlphaSummary(
        num_units=len(best),
        num_identity=len(best) - len(scaled),
        families=families,
        alpha_min=alphas[0] if alphas else None,
        alpha_median=alphas[len(alphas) // 2] if alphas else None,
        alpha_max=alphas[-1] if alphas else None,
        scale_min=scale_min,
        scale_max=scale_max,
        counts=counts_at(torch.tensor(alphas), ALPHA_POINTS),
    )
    return ChannelScale(found.per_channel, summary)


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


def smoothing_errors(
    scaled: Sequence[ScaledWeight], row_weights: Sequence[Tensor], samples: Sequence[Tensor]
) -> tuple[float, float]:
    """What rounding the input per token adds to the consumers' row-weighted errors: at s = 1, and at the chosen s.

    samples: tokens of what each reads, `[tokens, in]`.
    """
    plain, chosen = 0.0, 0.0
    for weight, row_weight, tokens in zip(scaled, row_weights, samples, strict=True):
        ones = torch.ones_like(weight.channel_scale)
        plain += token_rounding_error(weight.original, tokens, ones, row_weight)
        chosen += token_rounding_error(weight.original, tokens, weight.channel_scale, row_weight)
    return plain, chosen
