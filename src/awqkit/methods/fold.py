"""One fold: the channel scale that its consumers share, searched jointly over all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awqkit.decisions import AlphaSummary
from awqkit.methods.linear import QuantizedLinear, ScaledWeight, plain_weight
from awqkit.methods.plan import LinearPlan
from awqkit.numerics.channel_scale import (
    Candidate,
    best_per_unit,
    candidates,
    rounding_errors,
    search_units,
    tied_mean,
)
from awqkit.numerics.output_error import weighted_error
from awqkit.numerics.statistics import Statistics, second_moment


@dataclass(frozen=True, slots=True)
class ChannelScale:
    """A searched s per *producer* channel, `[producer channels]` float32, and how the search ended."""

    per_channel: Tensor
    alpha: AlphaSummary


@dataclass(frozen=True, slots=True)
class ScaleChoices:
    """The Recipe's part of a search: see `Recipe.scale_families`, `importance` and `alpha_search`."""

    families: tuple[str, ...]
    importance: str
    alpha_search: str


IMPORTANCE: dict[str, Callable[[Statistics], Tensor]] = {
    "square": lambda statistics: second_moment(statistics).diagonal(),
    "mean-abs": lambda statistics: statistics.mean_abs.square(),
}


def search_channel_scale(
    weights: Sequence[Tensor],
    row_weights: Sequence[Tensor],
    statistics: Statistics,
    channel_of: Tensor,
    num_producer_channels: int,
    plan: LinearPlan,
    choices: ScaleChoices,
) -> ChannelScale:
    """The s that minimises the consumers' summed error of nearest rounding.

    weights: float32 `[out_i, in]`, one per consumer, unscaled. row_weights: `[out_i]`, what an error in each output
    row costs. channel_of: `[in]` int64, −1 where s must stay 1. plan: any consumer's (they share a grid's choices).
    """
    weight, row_weight = torch.cat(list(weights)), torch.cat(list(row_weights))
    moment = second_moment(statistics)
    importance = tied_mean(IMPORTANCE[choices.importance](statistics), channel_of, num_producer_channels)
    column_energy = row_weight @ weight.square() / row_weight.sum().clamp(min=torch.finfo(torch.float32).tiny)
    column_rms = tied_mean(column_energy, channel_of, num_producer_channels).sqrt()
    unit_of_group = search_units(channel_of, num_producer_channels, plan.group_size)
    by_layer = choices.alpha_search == "layer"
    if by_layer:
        unit_of_group = torch.zeros_like(unit_of_group)
    unit_of_channel = unit_of_group.repeat_interleave(plan.group_size)
    tried = candidates(importance, column_rms, channel_of, unit_of_channel, choices.families)
    errors = rounding_errors(
        weight,
        moment,
        row_weight,
        tried,
        group_size=plan.group_size,
        full_moment=by_layer,
        **plan.grid_choices,
    )
    best = best_per_unit(errors, unit_of_group[:1] if by_layer else unit_of_group)
    scale = torch.stack([candidate.channel_scale for candidate in tried])
    chosen = scale.gather(0, best[unit_of_channel].unsqueeze(0)).squeeze(0)
    per_channel = torch.ones(num_producer_channels, device=weight.device)
    tied = channel_of >= 0
    per_channel[channel_of[tied]] = chosen[tied]
    return ChannelScale(per_channel, _summary(tried, best, per_channel))


def consumer_scale(per_channel: Tensor, channel_of: Tensor) -> Tensor:
    """s on a consumer's input channels, `[in]`: that of the producer channel, 1 where `channel_of` is −1."""
    scale = per_channel[channel_of.clamp(min=0)]
    return torch.where(channel_of >= 0, scale, torch.ones_like(scale))


def _summary(tried: Sequence[Candidate], best: Tensor, per_channel: Tensor) -> AlphaSummary:
    won = [tried[index] for index in best.tolist()]
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
        scale_min=float(per_channel.min()),
        scale_max=float(per_channel.max()),
    )


def fold_errors(
    consumers: Sequence[QuantizedLinear], scaled: Sequence[ScaledWeight], row_weights: Sequence[Tensor], moment: Tensor
) -> tuple[float, float]:
    """The consumers' summed, row-weighted errors on the full H: of plain rounding at s = 1, and of what was chosen.

    moment: H `[in, in]` of the original input. The rows' own division r is the same on both sides.
    """
    plain, chosen = 0.0, 0.0
    for linear, weight, row_weight in zip(consumers, scaled, row_weights, strict=True):
        chosen += weighted_error(linear.restored - weight.original, moment, row_weight)
        plain += weighted_error(plain_weight(weight, linear.plan) - weight.original, moment, row_weight)
    return plain, chosen
