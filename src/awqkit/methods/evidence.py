"""Evidence: what the linears that read one input are judged by, and the weight that they are to aim at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from awqkit.numerics.propagation import best_strength, correction
from awqkit.numerics.rounding_metric import RoundingMetric, energy_order, moment_order, rounding_metric
from awqkit.numerics.statistics import PairedStatistics, Statistics, cross_moment, moments_, second_moment
from awqkit.recipe import AUTO

_ALL = slice(None)
UNCHECKED_STRENGTH = 0.5  # "auto" with no rows to choose on: what the presets take


@dataclass(frozen=True, slots=True)
class MetricChoices:
    """The Recipe's part: see `Recipe.column_order`, `damping`, `damp_ratio` and `propagation`."""

    column_order: str
    damping: str
    damp_ratio: float
    propagation: float | str


@dataclass(frozen=True, slots=True)
class Readers:
    """The quantized linears that read one input: float32 weights `[out_i, in]` and what their rows' errors cost.

    row_weights: `[out_i]`, or `[out_i, out_i]` where errors of different rows add up (end-loss sensitivity).
    """

    weights: tuple[Tensor, ...]
    row_weights: tuple[Tensor, ...]

    @property
    def row_weight(self) -> Tensor:
        """All rows' own weights, stacked."""
        return torch.cat([each.diagonal() if each.dim() == 2 else each for each in self.row_weights])

    @property
    def column_energy(self) -> Tensor:
        """Row-weighted mean square of each column, `[in]`: rows that a fold may rescale count by what they cost."""
        total = self.row_weight
        return total @ torch.cat(list(self.weights)).square() / total.sum().clamp(min=torch.finfo(torch.float32).tiny)


@dataclass(frozen=True, slots=True)
class Evidence:
    """moment: H `[in, in]` of the input that the linear gets (Ĥ of the quantized stream with propagation), or its
    blocks on the diagonal (`numerics.output_error`).

    metric: the same, ready for rounding, or None where no step needs it. shift: β T `[in, in]`; or targets: what each
    reader aims at, where all of them have fewer rows than there are channels; neither where the weight itself is aimed
    at. strength: β. raised: why H needed more damping than was asked for, or None.
    """

    moment: Tensor
    metric: RoundingMetric | None
    shift: Tensor | None = None
    targets: tuple[Tensor, ...] | None = None
    strength: float = 0.0
    raised: str | None = None

    @property
    def bare(self) -> Evidence:
        """What rounding is judged by, and nothing else."""
        return Evidence(self.moment, self.metric)

    def target(self, weight: Tensor, reader: int = 0, rows: slice = _ALL) -> Tensor:
        """The rows of a weight `[out, in]` to aim at: W + β W T. reader: its place among those it was made for."""
        if self.targets is not None:
            return self.targets[reader][rows]
        weight = weight[rows]
        return weight if self.shift is None else torch.addmm(weight, weight, self.shift)


def original_evidence(statistics: Statistics, readers: Readers, choices: MetricChoices | None) -> Evidence:
    """From the original stream alone. choices: None where nothing needs a factorised H."""
    moment = second_moment(statistics)
    if choices is None:
        return Evidence(moment, None)
    metric = _metric(moment, readers, choices)
    return Evidence(moment, metric, raised=_raised(metric, choices))


def propagated_evidence(
    paired: PairedStatistics,
    held_out: PairedStatistics | None,
    readers: Readers,
    choices: MetricChoices,
    *,
    for_others: bool = False,
) -> Evidence:
    """From both streams; the buffers of `paired` become the evidence.

    held_out: of other rows, on which "auto" chooses the strength; without them it is a half. for_others: whether
    weights of other inputs are to be shifted by it, too.
    """
    moment, cross = moments_(paired)
    metric = _metric(moment, readers, choices)
    strength, raised = choices.propagation, _raised(metric, choices)
    rows = sum(len(weight) for weight in readers.weights)
    if strength != AUTO and rows < len(moment) and not for_others:
        targets = None
        if strength:
            difference = cross.sub_(moment).mul_(strength)
            targets = tuple(weight + metric.solve(weight @ difference) for weight in readers.weights)
        return Evidence(moment, metric, targets=targets, strength=strength, raised=raised)
    shift = correction(cross, metric)
    if strength == AUTO and held_out is None:
        strength = UNCHECKED_STRENGTH
    elif strength == AUTO:
        strength = best_strength(
            readers.weights,
            readers.row_weight.split([len(weight) for weight in readers.weights]),
            shift,
            cross_moment(held_out),
            second_moment(held_out.quantized),
        )
    return Evidence(moment, metric, shift.mul_(strength) if strength else None, strength=strength, raised=raised)


def _raised(metric: RoundingMetric, choices: MetricChoices) -> str | None:
    if metric.damp_ratio <= choices.damp_ratio:
        return None
    return f"H could not be factorised with a damping of {choices.damp_ratio:g}: {metric.damp_ratio:g} was used"


def _metric(moment: Tensor, readers: Readers, choices: MetricChoices) -> RoundingMetric:
    energy = readers.column_energy
    order = energy_order(moment, energy) if choices.column_order == "energy" else moment_order(moment)
    return rounding_metric(moment, order, choices.damp_ratio, choices.damping, energy)
