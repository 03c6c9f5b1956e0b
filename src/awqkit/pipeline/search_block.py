"""Choosing for one block: a channel scale per fold, codes for every linear, and undoing a fold that did harm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from awqkit.decisions import FoldDecision
from awqkit.methods.fold import ScaleChoices, consumer_scale, fold_errors, search_channel_scale
from awqkit.methods.linear import QuantizedLinear, ScaledWeight, quantize_linear
from awqkit.model.producers import store_producer
from awqkit.model.structure import Fold
from awqkit.numerics.statistics import Statistics
from awqkit.pipeline.context import BlockContext


@dataclass(frozen=True, slots=True)
class AppliedFold:
    """A proved fold with the s that is in use (all ones after a fallback) and its producer's values on disk."""

    fold: Fold
    channel_scale: Tensor
    stored: Mapping[str, Tensor]
    decision: FoldDecision


@dataclass(frozen=True, slots=True)
class Choice:
    """Everything chosen for a block. scaled: every linear's weight on its way; quantized: all but the kept ones."""

    scaled: Mapping[str, ScaledWeight]
    quantized: Mapping[str, QuantizedLinear]
    folds: tuple[AppliedFold, ...]


def choose_plainly(context: BlockContext, moments: Mapping[str, Tensor]) -> Choice:
    """Plain rounding for every linear, no scales; moments only serve to report errors."""
    scaled = {view.name: ScaledWeight.unscaled(context.weight(view.name)) for view in context.structure.linears}
    quantized = {
        name: quantize_linear(
            scaled[name], _moment(context, moments, name), replace(plan, clip="none", rounding="nearest")
        )
        for name, plan in context.block_plan.linears.items()
        if plan.keep is None
    }
    return Choice(scaled, quantized, ())


def choose(
    context: BlockContext,
    folds: Sequence[tuple[Fold, float]],
    statistics: Mapping[str, Statistics],
    moments: Mapping[str, Tensor],
    row_weights: Mapping[str, Tensor],
) -> Choice:
    """Search every fold, quantize every linear under the scales, and undo folds whose consumers got worse.

    statistics, moments (H of the same): by the first reader of an input. row_weights: `[out]` by linear.
    """
    applied = [_search(context, fold, proof, statistics, row_weights) for fold, proof in folds]
    scaled = _scaled_weights(context, applied)
    quantized = {
        name: quantize_linear(scaled[name], _moment(context, moments, name), plan)
        for name, plan in context.block_plan.linears.items()
        if plan.keep is None
    }
    # Folds that linears produce for come first: undoing one changes the rows of a linear that another fold feeds.
    for position in sorted(range(len(applied)), key=lambda index: applied[index].fold.producer_linear is None):
        entry = applied[position]
        consumers = [name for name in entry.fold.consumers if not context.kept(name)]
        plain, chosen = fold_errors(
            [quantized[name] for name in consumers],
            [scaled[name] for name in consumers],
            [row_weights[name] for name in consumers],
            _moment(context, moments, consumers[0]),
        )
        decision = replace(entry.decision, error_nearest=plain, error_chosen=chosen)
        if chosen > plain:
            reason = f"scaling raised the consumers' error ({chosen:.3e} > {plain:.3e}): s = 1 restored"
            applied[position] = _undone(context, entry, replace(decision, fallback=reason))
            scaled = _scaled_weights(context, applied)
            producer = entry.fold.producer_linear  # its rows were on their way divided by s
            again = [producer] if producer is not None and not context.kept(producer) else []
            for name in [*again, *consumers]:
                plan = context.block_plan.linears[name]
                quantized[name] = quantize_linear(scaled[name], _moment(context, moments, name), plan)
        else:
            applied[position] = replace(entry, decision=decision)
    return Choice(scaled, quantized, tuple(applied))


def _search(
    context: BlockContext,
    fold: Fold,
    proof_error: float,
    statistics: Mapping[str, Statistics],
    row_weights: Mapping[str, Tensor],
) -> AppliedFold:
    consumers = [name for name in fold.consumers if not context.kept(name)]
    recipe = context.recipe
    found = search_channel_scale(
        [context.weight(name) for name in consumers],
        [row_weights[name] for name in consumers],
        statistics[context.structure.input_of(consumers[0]).first],
        fold.channel_of[consumers[0]],
        fold.num_channels,
        context.block_plan.linears[consumers[0]],
        ScaleChoices(recipe.scale_families, recipe.importance, recipe.alpha_search),
    )
    keeps = len(consumers) < len(fold.consumers) or (
        fold.producer_linear is not None and context.kept(fold.producer_linear)
    )
    stored = store_producer(
        fold, context.parameters, found.per_channel, context.plan.stored_dtype, keeps_full_precision=keeps
    )
    decision = FoldDecision(fold.label, fold.kind, fold.consumers, fold.num_channels, proof_error, alpha=found.alpha)
    return AppliedFold(fold, stored.channel_scale, stored.values, decision)


def _undone(context: BlockContext, entry: AppliedFold, decision: FoldDecision) -> AppliedFold:
    ones = torch.ones_like(entry.channel_scale)
    return AppliedFold(entry.fold, ones, {name: context.parameters[name] for name in entry.stored}, decision)


def _scaled_weights(context: BlockContext, applied: Sequence[AppliedFold]) -> dict[str, ScaledWeight]:
    scaled = {view.name: ScaledWeight.unscaled(context.weight(view.name)) for view in context.structure.linears}
    for entry in applied:
        for name in entry.fold.consumers:
            scale = consumer_scale(entry.channel_scale, entry.fold.channel_of[name])
            scaled[name] = replace(scaled[name], channel_scale=scaled[name].channel_scale * scale)
        producer = entry.fold.producer_linear
        if producer is not None:
            scaled[producer] = replace(scaled[producer], row_scale=scaled[producer].row_scale * entry.channel_scale)
    return scaled


def _moment(context: BlockContext, moments: Mapping[str, Tensor], linear: str) -> Tensor | None:
    return moments.get(context.structure.input_of(linear).first)
