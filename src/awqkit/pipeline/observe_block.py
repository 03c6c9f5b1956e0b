"""Running one block on the calibration rows: proofs, row weights, statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from awqkit.decisions import FoldDecision
from awqkit.errors import CheckpointError
from awqkit.kernels.precision import full_precision
from awqkit.model.block_calls import Handed, hand_on
from awqkit.model.observe import LinearWatch
from awqkit.model.proof import PROOF_TOLERANCE, proof_errors
from awqkit.model.routing import PickedRows, run_with_all_experts
from awqkit.model.structure import Fold, LinearInput
from awqkit.numerics.statistics import (
    PairedStatistics,
    Statistics,
    accumulate_,
    accumulate_paired_,
    empty_paired,
    empty_statistics,
    finished,
    finished_paired,
    pooled,
    second_moment,
    whole_groups,
)
from awqkit.pipeline.activations import HiddenStates
from awqkit.pipeline.block_statistics import BlockStatistics, ExpertChunks, chunk_numbers
from awqkit.pipeline.context import BlockContext
from awqkit.pipeline.expert_tokens import (
    MetTokens,
    few_tokens_shrunk,
    of_tokens,
    picked_inputs,
    usual_of_experts,
    with_few_tokens_shrunk,
)
from awqkit.pipeline.kept_inputs import KeptInputs
from awqkit.pipeline.plan import Probe
from awqkit.pipeline.row_parts import OwnRows, by_part
from awqkit.pipeline.summed_statistics import summed_paired, summed_statistics

Pair = tuple[slice, Tensor, Tensor, "Tensor | None"]  # rows, their input on both streams, and the mask

_SEED_STRIDE = 1_000_003  # keeps the probes of block i and seed j apart


def refuse_non_finite(context: BlockContext) -> None:
    """Raises CheckpointError naming the first tensor of the block with NaN or inf."""
    values = {name: value for name, value in context.parameters.items() if value.numel()}
    ends = torch.stack([end for value in values.values() for end in value.aminmax()]).tolist()
    for (name, value), *both in zip(values.items(), ends[::2], ends[1::2], strict=True):
        if not all(map(math.isfinite, both)):  # the least and the largest are NaN where any is
            parts = context.skeleton.parts(f"{context.block_plan.path}.{name}", value)
            wrong = (disk for disk, part in parts.items() if not bool(torch.isfinite(part).all()))
            disk = next(wrong, f"{context.block_plan.path}.{name}")  # shared, on disk under another block's name
            raise CheckpointError(
                f"tensor {disk} holds NaN or inf, so the checkpoint is damaged: fetch or convert it again; "
                "nothing was kept of this run"
            )


def prove_folds(context: BlockContext, rows: HiddenStates) -> tuple[list[tuple[Fold, float]], list[FoldDecision]]:
    """The folds that are exact in this very block, with the proof's error, and a Decision for each refused one.

    Proved on random hidden states and, in the probe's second row, on those that `rows` really have here, which may
    reach a clamp or a branch that random ones do not.
    """
    probe = _with_real_states(context, rows)
    run = probe.runner(context.block, context.index)
    asked: list[Fold] = []
    refused = [
        FoldDecision(refusal.label, "none", refusal.consumers, 0, None, fallback=refusal.reason)
        for refusal in context.structure.refusals
    ]
    for fold in context.structure.folds:
        consumers = [name for name in fold.consumers if not context.kept(name)]
        if not consumers:
            continue  # nothing that s could help
        reason = fold.why_not_together(consumers)
        if reason is None:
            asked.append(fold)
        else:
            refused.append(_refused(fold, None, reason))

    def errors() -> list[float]:
        with torch.no_grad(), full_precision():
            return proof_errors(context.block, run, probe.hidden, context.structure, asked) if asked else []

    proved = []
    (found,) = context.ranks.spread([errors], [1.0])  # by one rank, so that all agree
    for fold, error in zip(asked, found, strict=True):
        if error <= PROOF_TOLERANCE:
            proved.append((fold, error))
        else:
            reason = f"not exact in this block: its output changes by {error:.1e} under powers of two"
            refused.append(_refused(fold, error, reason))
    return proved, refused


def _refused(fold: Fold, error: float | None, reason: str) -> FoldDecision:
    return FoldDecision(fold.label, fold.kind, fold.consumers, fold.num_channels, error, fallback=reason)


def _with_real_states(context: BlockContext, rows: HiddenStates) -> Probe:
    """The probe with the first tokens of the first row in place of its last row, repeated where that row is shorter.

    What the block before hands on beside hidden states stays the probe's.
    """
    probe = context.plan.probe
    _, hidden, _, _ = next(iter(rows.batches(context.index)))
    position = torch.arange(probe.hidden.shape[1], device=hidden.device) % hidden.shape[1]
    return Probe(torch.cat([probe.hidden[:-1], hidden[:1, position]]), probe.calls)


def measure_row_weights(context: BlockContext, probe_rows: HiddenStates) -> dict[str, Tensor]:
    """For every linear `[out]`: the mean squared gradient of a random probe of the block's output.

    One backward pass over a few rows gives G_ii, how much the block's output feels an error in output row i. The
    probe rows move on to the block's output. A linear that the output feels nothing of has equal weights.
    """
    outputs: dict[str, Tensor] = {}

    def after(name: str, output: Tensor) -> None:
        if output.requires_grad:  # not where a model only chooses by it, without a gradient
            output.retain_grad()
            outputs[name] = output

    views = context.structure.linears
    watched = {view.weight: context.weight(view.name) for view in views}
    generator = torch.Generator(context.device).manual_seed(context.recipe.seed * _SEED_STRIDE + context.index)
    squares: dict[str, Tensor] = {}
    for part, hidden, call, mask in probe_rows.batches(context.index):
        outputs.clear()
        with torch.enable_grad(), LinearWatch(watched, after=after):
            result, beside = hand_on(context.block, hidden.clone().requires_grad_(True), call)
        noise = torch.randn(result.shape, generator=generator, device=result.device)
        if mask is not None:
            noise = noise * mask.reshape(*mask.shape, *(1,) * (noise.dim() - 2))
        result.backward(noise.to(result.dtype))
        felt = {view.name: outputs[view.weight].grad for view in views if view.weight in outputs}
        felt = {name: gradient for name, gradient in felt.items() if gradient is not None}
        products = torch._foreach_mul(list(felt.values()), list(felt.values())) if felt else ()
        for name, product in zip(felt, products, strict=True):
            mean = product.reshape(-1, product.shape[-1]).mean(dim=0)
            squares[name] = squares[name].add_(mean) if name in squares else mean
        probe_rows.write(part, result.detach(), beside)
    largest = torch.stack(torch._foreach_norm(list(squares.values()), math.inf)).tolist() if squares else ()
    unfelt = {view.name for view in views} - {name for name, most in zip(squares, largest, strict=True) if most != 0}
    usual = usual_of_experts([view for view in views if view.name not in unfelt], squares) if unfelt else {}
    for view in views:
        if view.name in unfelt:
            key = (view.expert.experts, view.expert.part) if view.expert else None
            squares[view.name] = torch.full((view.shape[0],), usual.get(key, 1.0), device=context.device)
    return {view.name: squares[view.name] for view in views}


def observe(
    context: BlockContext,
    rows: HiddenStates,
    token_weight: Tensor | None = None,
    kept: KeptInputs | None = None,
    group_size: int | None = None,
    *,
    sampled: bool = True,
) -> BlockStatistics:
    """Statistics of every linear input, by its first reader; the rows move on to the block's output.

    token_weight: `[rows, tokens]`, see `numerics.statistics`. kept: filled with the inputs themselves, if given, but
    for those of experts. group_size: for no more of each gram than its blocks of that size, where they tile it.
    sampled: whether some tokens themselves are kept as well. An expert whose tokens cannot be told from one another
    counts padding as well. Where a block has more experts than `BlockContext.experts_at_once`, theirs are made later,
    chunk by chunk.
    """
    structure, numbers = context.structure, chunk_numbers(context.structure, context.experts_at_once)
    blocks = {entry.first: whole_groups(entry.num_channels, group_size) for entry in structure.inputs}
    if numbers:
        return _observed_in_chunks(context, rows, token_weight, kept, blocks, numbers, sampled=sampled)
    sums = [_Sum(entry.first, entry.num_channels, blocks[entry.first], (entry.first,)) for entry in structure.inputs]
    found = _summed(context, rows, token_weight, _Observer(context, kept, sums, sampled=sampled), moves_on=True)
    return BlockStatistics(with_few_tokens_shrunk(structure, found))


def _observed_in_chunks(
    context: BlockContext,
    rows: HiddenStates,
    token_weight: Tensor | None,
    kept: KeptInputs | None,
    blocks: Mapping[str, int | None],
    numbers: Mapping[str, int],
    *,
    sampled: bool,
) -> BlockStatistics:
    """Whole statistics of what every token meets; of experts their tokens, and the statistics of all together.

    blocks: of each gram the size of what is kept of it, None for the whole. What a chunk is made from are the rows as
    they are now, of which a copy is kept.
    """
    structure, entered = context.structure, rows.copy_on_host()
    alike = {" ".join((each[0].expert.experts, each[0].expert.part)): each for each in structure.inputs_of_experts()}
    sums = [
        _Sum(entry.first, entry.num_channels, 1 if entry.first in numbers else blocks[entry.first], (entry.first,))
        for entry in structure.inputs
    ]
    for name, entries in alike.items():
        first = entries[0].first
        sums.append(_Sum(name, entries[0].num_channels, blocks[first], tuple(entry.first for entry in entries)))
    found = _summed(context, rows, token_weight, _Observer(context, kept, sums, sampled=sampled), moves_on=True)
    together: dict[str, Statistics] = {}
    for name, entries in alike.items():
        evenly = pooled([found[entry.first] for entry in entries]).sample
        together |= dict.fromkeys((entry.first for entry in entries), replace(found[name], sample=evenly))
    picked = picked_inputs(structure)

    def make(names: Collection[str]) -> dict[str, Statistics]:
        chunk = [_Sum(first, structure.input_of(first).num_channels, blocks[first], (first,)) for first in names]
        seen = _summed(context, entered, token_weight, _Observer(context, None, chunk, sampled=sampled), moves_on=False)
        made = {}
        for first in names:
            entry, moment = structure.input_of(first), second_moment(together[first])
            made[first] = few_tokens_shrunk(entry, seen.pop(first), moment, is_picked=first in picked)
        return made

    tokens = {first: found[first].token_count for first in numbers}
    held = {entry.first: found[entry.first] for entry in structure.inputs if entry.first not in numbers}
    return BlockStatistics(held, ExpertChunks(numbers, tokens, together, make))


def _summed(
    context: BlockContext, rows: HiddenStates, token_weight: Tensor | None, observer: _Observer, *, moves_on: bool
) -> dict[str, Statistics]:
    """What an observer finds in the rows of all ranks, finished. moves_on: whether these go to the block's output."""
    structure = context.structure
    experts = {entry.first for entry in structure.inputs if entry.expert is not None}
    in_turn = experts if context.recipe.all_experts else set()
    others = {entry.first for entry in structure.inputs} - in_turn

    def of_parts() -> Iterator[Mapping[str, Statistics]]:
        for batches in by_part(rows.batches(context.index), rows.own.ends):
            observer.begin()
            for part, hidden, call, mask in batches:
                run, weight = partial(hand_on, context.block, hidden, call), _weights_of(token_weight, part, hidden)
                see = partial(observer.see, run, part, mask, weight)
                output = see(leave_out=in_turn) if moves_on or not in_turn else None
                if in_turn:
                    run_with_all_experts(partial(see, leave_out=others), structure.experts)
                if moves_on:
                    rows.write(part, *output)
            yield observer.taken()

    reserved = float(rows.tokens_per_batch * context.memory.token)
    seen = summed_statistics(context.ranks, of_parts(), len(rows.own.ends), reserved)
    return {name: finished(seen.pop(name)) for name in list(seen)}  # no two of each at once


@dataclass(frozen=True, slots=True)
class _Sum:
    """Statistics with a name, of what some linears read. block: of the gram's blocks of that size, None for all."""

    name: str
    num_channels: int
    block: int | None
    readers: tuple[str, ...]


class _Observer:
    """Sums as they grow, by name."""

    def __init__(self, context: BlockContext, kept: KeptInputs | None, sums: Sequence[_Sum], *, sampled: bool) -> None:
        self.found: dict[str, Statistics] = {}
        self._sampled = sampled
        self._sums, self._device, self._kept = sums, context.device, kept
        self._counted_in: dict[str, list[str]] = {}
        self._has_experts = any(entry.expert is not None for entry in context.structure.inputs)
        for each in sums:
            for first in each.readers:
                self._counted_in.setdefault(first, []).append(each.name)
        self._by_weight = {context.structure.linear(entry.first).weight: entry for entry in context.structure.inputs}
        self._watched = {name: context.weight(entry.first) for name, entry in self._by_weight.items()}

    def begin(self) -> None:
        """Begin with no tokens."""
        self.found = {
            each.name: empty_statistics(each.num_channels, self._device, each.block, sampled=self._sampled)
            for each in self._sums
        }

    def taken(self) -> dict[str, Statistics]:
        """What was found, which is not held here any longer."""
        found, self.found = self.found, {}
        return found

    def see(
        self,
        run: Callable[[], Handed],
        part: slice,
        mask: Tensor | None,
        weight: Tensor | None,
        *,
        leave_out: Collection[str],
    ) -> Handed:
        """Add what the linears read in one run of the block on some rows, and return what it gives."""
        picked, met = PickedRows(), MetTokens()

        def before(name: str, inputs: Tensor) -> None:
            entry, counted = self._by_weight[name], (mask, weight)
            if entry.first in leave_out:
                return
            if entry.expert is not None:
                rows = picked.rows_of(inputs)
                if rows is not None and self._kept is not None:
                    self._kept.find_source(entry.expert.experts, inputs, rows)
                numbers = met.of(entry.expert, rows, inputs)
                counted = tuple(of_tokens(each, numbers) for each in counted)
            elif self._kept is not None:
                self._kept.keep(entry.first, part, inputs)
            for each in self._counted_in.get(entry.first, ()):
                self.found[each] = accumulate_(self.found[each], inputs, *counted)

        try:
            follow = picked if self._has_experts else nullcontext()  # inside the watch: not what `before` does
            with torch.no_grad(), LinearWatch(self._watched, before=before), follow:
                return run()
        finally:
            if self._kept is not None:
                self._kept.let_go()


def observe_pair(
    context: BlockContext,
    entry: LinearInput,
    pairs: Iterable[Pair],
    own: OwnRows,
    token_weight: Tensor | None = None,
    reserved: float = 0.0,
) -> PairedStatistics:
    """One linear input on both streams. own: which rows these are. reserved: bytes that computing `pairs` takes."""

    def of_parts() -> Iterator[PairedStatistics]:
        for batches in by_part(pairs, own.ends):
            paired = empty_paired(entry.num_channels, context.device)
            for part, original, reached, mask in batches:
                # both as the original is kept: where the streams are the same, C − Ĥ must be nothing
                pair = (original.to(torch.bfloat16), reached.to(torch.bfloat16))
                paired = accumulate_paired_(paired, *pair, mask, _weights_of(token_weight, part, reached))
            yield paired
            del paired  # not beside the next

    return finished_paired(summed_paired(context.ranks, of_parts(), len(own.ends), reserved))


def _weights_of(token_weight: Tensor | None, part: slice, hidden: Tensor) -> Tensor | None:
    """What the tokens of some rows count; None where each counts 1, so that nothing is multiplied."""
    if token_weight is None:
        return None
    weights = token_weight[part]
    return None if bool((weights == 1).all()) else weights.to(hidden.device)
