"""What experts are judged by: the tokens that met them, and what stands in where those are too few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from awqkit.decisions import ENOUGH_TOKENS
from awqkit.model.matrices import Expert
from awqkit.model.structure import BlockStructure, LinearInput, LinearView
from awqkit.numerics.output_error import moment_diagonal
from awqkit.numerics.statistics import Statistics, pooled, second_moment, shrunk
from awqkit.pipeline.block_statistics import BlockStatistics


class MetTokens:
    """Which tokens an expert met, for those of its linears whose input is computed from them."""

    def __init__(self) -> None:
        self._expert: tuple[str, int] | None = None
        self._numbers: Tensor | None = None

    def of(self, expert: Expert, numbers: Tensor | None, inputs: Tensor) -> Tensor | None:
        """The numbers of the tokens in `inputs`: as they were just picked out, or those that this expert met before."""
        key = (expert.experts, expert.index)
        if numbers is None and key == self._expert and self._numbers is not None:
            numbers = self._numbers if len(self._numbers) == inputs.shape[:-1].numel() else None
        self._expert, self._numbers = key, numbers
        return numbers


def of_tokens(per_token: Tensor | None, numbers: Tensor | None) -> Tensor | None:
    """The values of some tokens, by their number, of `[rows, tokens]`; None where one of both is not known."""
    return None if per_token is None or numbers is None else per_token.reshape(-1)[numbers]


def usual_of_experts(views: Sequence[LinearView], squares: Mapping[str, Tensor]) -> dict[tuple[str, str], float]:
    """The mean row weight of the experts' like parts, for those that no token of the probe met."""
    of_experts = [(view.expert, squares[view.name].mean()) for view in views if view.expert is not None]
    means = torch.stack([mean for _, mean in of_experts]).tolist() if of_experts else ()  # one look at a device
    found: dict[tuple[str, str], list[float]] = {}
    for (expert, _), mean in zip(of_experts, means, strict=True):
        found.setdefault((expert.experts, expert.part), []).append(mean)
    return {key: sum(values) / len(values) for key, values in found.items()}


def with_few_tokens_shrunk(structure: BlockStructure, found: Mapping[str, Statistics]) -> dict[str, Statistics]:
    """Statistics by first reader, those of experts with fewer than `ENOUGH_TOKENS` tokens a channel drawn to a mean.

    What experts read is picked from one tensor, so the H of all tokens that met any of them stands in. What an expert
    computes on the way has channels of its own, for which only a mean diagonal does: its own, or that of the others.
    """
    result, picked = dict(found), picked_inputs(structure)
    for alike in structure.inputs_of_experts():
        together = second_moment(pooled([found[entry.first] for entry in alike]))
        for entry in alike:
            is_picked = entry.first in picked
            result[entry.first] = few_tokens_shrunk(entry, found[entry.first], together, is_picked=is_picked)
    return result


def few_tokens_shrunk(entry: LinearInput, own: Statistics, together: Tensor, *, is_picked: bool) -> Statistics:
    """The same of one expert's input. together: H of all experts' like parts."""
    prior = together
    if not is_picked:
        level = second_moment(own) if own.token_count else together
        prior = moment_diagonal(level).mean() * torch.eye(level.shape[-1], device=level.device).expand_as(level)
    return shrunk(own, prior, ENOUGH_TOKENS * entry.num_channels)


def picked_inputs(structure: BlockStructure) -> frozenset[str]:
    """The first readers of the inputs that experts pick from tokens, and do not compute themselves."""
    found: dict[str, list[str]] = {}
    for alike in structure.inputs_of_experts():
        found.setdefault(alike[0].expert.experts, [entry.first for entry in alike])
    return frozenset(first for firsts in found.values() for first in firsts)


def share_of_tokens(entry: LinearInput, statistics: BlockStatistics) -> float:
    """How much of the block's tokens an input is made of: 1 for every token, less for an expert's."""
    if entry.expert is None:
        return 1.0
    return statistics.tokens(entry.first) / max(statistics.most_tokens, 1)
