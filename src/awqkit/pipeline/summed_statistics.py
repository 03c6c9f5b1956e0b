"""Statistics of one rank's rows become those of all rows: part by part, then over the ranks, in one order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from awqkit.numerics.statistics import (
    Gram,
    PairedStatistics,
    Statistics,
    added_gram_,
    added_paired_,
    all_added_,
    joined_samples,
    sampled_evenly,
)
from awqkit.pipeline.free_memory import is_spare
from awqkit.pipeline.kept_states import on_host
from awqkit.pipeline.ranks import Ranks
from awqkit.pipeline.row_parts import in_pairs

Summed = TypeVar("Summed", Statistics, Gram)


def summed_statistics(
    ranks: Ranks, parts: Iterable[Mapping[str, Statistics]], own_parts: int, reserved: float = 0.0
) -> dict[str, Statistics]:
    """By name, of the parts of this rank's rows and of every other rank's; while accumulating, as each part is.

    own_parts: how many this rank has; all have as many. reserved: bytes of the device that the next part needs beside
    its own sums, for which sums that wait go to the host.
    """

    def short(part: Mapping[str, Statistics]) -> dict[str, Statistics]:
        return {name: sampled_evenly(found, own_parts * ranks.size) for name, found in part.items()}

    own = in_pairs(map(short, parts), all_added_, partial(_aside, reserved=reserved), own_parts)
    if ranks.size == 1:
        return own
    grams = summed_grams(ranks, [{name: Gram(found.weight_sum, found.gram) for name, found in own.items()}], 1)
    channels = [len(found.abs_sum) for found in own.values()]
    (counts,) = ranks.summed(torch.tensor([found.token_count for found in own.values()], dtype=torch.int64))
    (abs_sum,) = ranks.summed(torch.cat([found.abs_sum for found in own.values()]))
    max_abs = ranks.largest(torch.cat([found.max_abs for found in own.values()]))
    abs_sums, maxima = abs_sum.split(channels), max_abs.split(channels)
    samples = ranks.everyones([found.sample for found in own.values()])
    return {
        name: Statistics(
            int(counts[number]),
            grams[name].weight_sum,
            abs_sums[number],
            maxima[number],
            joined_samples([of_rank[number] for of_rank in samples]),
            grams[name].gram,
        )
        for number, name in enumerate(own)
    }


def summed_grams(
    ranks: Ranks, parts: Iterable[Mapping[str, Gram]], own_parts: int, reserved: float = 0.0
) -> dict[str, Gram]:
    """The same of grams alone."""

    def added(first: dict[str, Gram], second: dict[str, Gram]) -> dict[str, Gram]:
        return {name: added_gram_(found, second[name]) for name, found in first.items()}

    own = in_pairs(map(dict, parts), added, partial(_aside, reserved=reserved), own_parts)
    weights = summed_numbers(ranks, [[found.weight_sum for found in own.values()]])
    grams = ranks.summed(*(found.gram for found in own.values()))
    return {name: Gram(*each) for name, each in zip(own, zip(weights, grams, strict=True), strict=True)}


def summed_paired(
    ranks: Ranks, parts: Iterable[PairedStatistics], own_parts: int, reserved: float = 0.0
) -> PairedStatistics:
    """The same of one input on both streams."""

    def waiting(paired: PairedStatistics) -> PairedStatistics:
        grams = _where_there_is_room([paired.quantized.gram, paired.cross_gram], reserved)
        return PairedStatistics(replace(paired.quantized, gram=grams[0]), grams[1])

    own = in_pairs(parts, added_paired_, waiting, own_parts)
    quantized = summed_grams(ranks, [{"": own.quantized}], 1)[""]
    (cross_gram,) = ranks.summed(own.cross_gram)
    return replace(own, quantized=quantized, cross_gram=cross_gram)


def summed_numbers(ranks: Ranks, parts: Iterable[list[float]]) -> list[float]:
    """The same of a few numbers, in float64."""
    own = in_pairs(parts, lambda first, second: [one + other for one, other in zip(first, second, strict=True)])
    if ranks.size == 1:
        return own
    (total,) = ranks.summed(torch.tensor(own, dtype=torch.float64))
    return total.tolist()


def _aside(part: dict[str, Summed], reserved: float) -> dict[str, Summed]:
    grams = _where_there_is_room([found.gram for found in part.values()], reserved)
    return {name: replace(found, gram=gram) for (name, found), gram in zip(part.items(), grams, strict=True)}


def _where_there_is_room(grams: list[Tensor], reserved: float) -> list[Tensor]:
    """Grams as they are, or on the host where the device has no room for two more such sums."""
    device, size = grams[0].device if grams else torch.device("cpu"), sum(gram.nbytes for gram in grams)
    if device.type == "cpu" or is_spare(2.0 * size, 1.0, reserved, device):
        return grams
    return [on_host(gram) for gram in grams]
