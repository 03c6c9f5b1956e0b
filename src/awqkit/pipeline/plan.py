"""What a run will do, settled before it starts: structure of every kind of block, a plan for every linear.

Whatever can be refused is refused here, before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from awqkit.errors import FormatError, ModelError, UsageError
from awqkit.methods.plan import LinearPlan
from awqkit.model.block_calls import BlockCall, Carried, Handed, hand_on
from awqkit.model.causality import sees_later_tokens
from awqkit.model.folds import discover
from awqkit.model.shared_weights import why_shared_stays, without_shared_folds
from awqkit.model.skeleton import Skeleton
from awqkit.model.structure import BlockStructure, LinearView
from awqkit.recipe import DEFAULT_GROUP_SIZES, PER_CHANNEL, Recipe

_CHOOSES = "weighs or chooses experts, as many outputs as there are of them: stays in full precision"
WhyShadowed = Callable[[str, Sequence[str]], "str | None"]
PROBE_TOKENS = 16
PROBE_ROWS = 2  # for a proof the second row is the calibration's own hidden states


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """One block: its path, what discovery found in its kind, and the plan of each linear by name inside the block."""

    index: int
    path: str
    structure: BlockStructure
    linears: dict[str, LinearPlan]


@dataclass(frozen=True, slots=True)
class Probe:
    """A short random input with which a block of this model can be run at any time, one call per block."""

    hidden: Tensor
    calls: tuple[BlockCall, ...]

    def runner(self, block: torch.nn.Module, index: int) -> Callable[[], Handed]:
        """A function that runs `block` on the probe."""
        return lambda: hand_on(block, self.hidden, self.calls[index])


@dataclass(frozen=True, slots=True)
class RunPlan:
    """All blocks, with the group size that was chosen (−1: one group a row) and the dtype of what is not packed."""

    blocks: tuple[BlockPlan, ...]
    probe: Probe
    group_size: int
    stored_dtype: torch.dtype

    @property
    def linears(self) -> list[LinearPlan]:
        """Every linear of every block, in order."""
        return [plan for block in self.blocks for plan in block.linears.values()]


def make_probe(skeleton: Skeleton, device: torch.device) -> Probe:
    """A probe of two rows of 16 tokens: the first ids of the vocabulary fix the arguments, the states are N(0, 1).

    What a block gets from the one before is what that one, run on the probe, hands on.
    """
    ids = torch.arange(PROBE_TOKENS).remainder(skeleton.vocabulary_size).expand(PROBE_ROWS, PROBE_TOKENS)
    (started,) = skeleton.start([(ids, None)], device)
    noise = torch.randn(started.hidden.shape, generator=torch.Generator().manual_seed(0))
    return Probe(noise.to(device), _with_what_is_handed_on(skeleton, noise.to(device), started.calls))


def _with_what_is_handed_on(skeleton: Skeleton, hidden: Tensor, calls: tuple[BlockCall, ...]) -> tuple[BlockCall, ...]:
    """The calls with what their block gets from the one before; a block alike gets what the first of its kind gets."""
    if not any(call.wanted for call in calls):
        return calls
    kinds = [(skeleton.block_kind(index), call.asks) for index, call in enumerate(calls)]
    last = max(kinds.index(kind) for kind in kinds)
    found: dict[Any, tuple[Carried, ...]] = {kinds[0]: ()}
    beside: tuple[Carried, ...] = ()
    for index, call in enumerate(calls[: last + 1]):
        found.setdefault(kinds[index], beside)
        if index < last:
            block = skeleton.load_block(index, hidden.device)
            try:
                with torch.no_grad():
                    beside = hand_on(block, hidden, call.given(beside)).beside
            finally:
                skeleton.release_block(index)
    return tuple(call.given(found[kind]) for kind, call in zip(kinds, calls, strict=True))


def discover_blocks(
    skeleton: Skeleton, probe: Probe, device: torch.device, *, look_for_folds: bool = True
) -> list[BlockStructure]:
    """The structure of every block; blocks of one kind are looked at once, on the real weights of the first."""
    by_kind: dict[Any, BlockStructure] = {}
    structures = []
    for index in range(skeleton.num_blocks):
        kind = skeleton.block_kind(index)
        if kind not in by_kind:
            by_kind[kind] = discover_block(skeleton, probe, index, device, look_for_folds=look_for_folds)
        structures.append(by_kind[kind])
    return structures


def discover_block(
    skeleton: Skeleton, probe: Probe, index: int, device: torch.device, *, look_for_folds: bool = True
) -> BlockStructure:
    """The structure of one block. Raises ModelError for an encoder's, and where there is nothing to quantize."""
    block = skeleton.load_block(index, device)
    try:
        if sees_later_tokens(block, probe.hidden, probe.calls[index]):
            raise ModelError(
                f"{skeleton.block_path(index)}: a token sees the ones after it, so this is an encoder; "
                "awqkit takes decoder-only models"
            )
        found = discover(block, probe.runner(block, index), probe.hidden, look_for_folds=look_for_folds)
    finally:
        skeleton.release_block(index)
    if not found.linears:
        raise ModelError(
            f"{skeleton.block_path(index)}: nothing to quantize, no weight of this block is used as a linear"
        )
    return without_shared_folds(found, skeleton.shared_by(index))


def plan_run(
    skeleton: Skeleton,
    recipe: Recipe,
    stored_dtype: torch.dtype,
    device: torch.device,
    why_not_held: Callable[[int, int, int], str | None],
    fused_partners: Callable[[Sequence[str]], Sequence[Sequence[str]]],
    why_shadowed: WhyShadowed = lambda linear, outside: None,
) -> RunPlan:
    """The plan for every linear of the model, see `plan_linears`."""
    found = look_at(skeleton, device, look_for_folds=recipe.folds == "on")
    return plan_linears(skeleton, found, recipe, stored_dtype, why_not_held, fused_partners, why_shadowed)


@dataclass(frozen=True, slots=True)
class Found:
    """What every plan for a model starts from: a probe, and the structure of each block."""

    probe: Probe
    structures: tuple[BlockStructure, ...]


def look_at(skeleton: Skeleton, device: torch.device, *, look_for_folds: bool = True) -> Found:
    """What discovery finds in the model, whatever else the recipe says. Raises ModelError for one not understood."""
    probe = make_probe(skeleton, device)
    return Found(probe, tuple(discover_blocks(skeleton, probe, device, look_for_folds=look_for_folds)))


def plan_linears(
    skeleton: Skeleton,
    found: Found,
    recipe: Recipe,
    stored_dtype: torch.dtype,
    why_not_held: Callable[[int, int, int], str | None],
    fused_partners: Callable[[Sequence[str]], Sequence[Sequence[str]]],
    why_shadowed: WhyShadowed = lambda linear, outside: None,
) -> RunPlan:
    """The plan for every linear of the model by one recipe.

    why_not_held(out, in, group_size), fused_partners(paths), why_shadowed(path, paths outside of the blocks): what the
    format says. Raises UsageError where the group size that was asked for does not divide an input, and where nothing
    is left to quantize.
    """
    structures = found.structures
    views = [(skeleton.block_path(i), view) for i, structure in enumerate(structures) for view in structure.linears]
    shapes = {f"{path}.{view.name}": view.shape for path, view in views}
    wanted = {name: shape for name, shape in shapes.items() if not recipe.ignores(name)}
    group_size = choose_group_size(recipe.group_size, wanted)
    reasons = {name: "matches --ignore" for name in shapes if name not in wanted}
    outside = skeleton.linears_outside_blocks()
    held_by: dict[str, str] = {}  # path on disk -> the linear
    for index, structure in enumerate(structures):
        path = skeleton.block_path(index)
        for view in structure.linears:
            name = f"{path}.{view.name}"
            if view.expert is None and (view.shape[0] == 1 or view.shape[0] in structure.experts):
                reasons.setdefault(name, _CHOOSES)
            shared = why_shared_stays(view, skeleton.shared_by(index))
            if shared is not None:
                reasons.setdefault(name, shared)
            parts = skeleton.matrix_parts(f"{path}.{view.weight}", transposed=view.transposed)
            reason = _why_not_on_disk(view, parts)
            for disk, rows in (parts or {}).items():
                held_by[disk.removesuffix(".weight")] = name
                num_rows = len(range(*rows.indices(view.shape[0])))
                reason = reason or why_not_held(num_rows, view.shape[1], group_size)
                reason = reason or why_shadowed(disk.removesuffix(".weight"), outside)
            if reason is not None:
                reasons.setdefault(name, reason)
            held_by.setdefault(name, name)
    for paths in fused_partners(list(held_by)):
        partners = dict.fromkeys(held_by[each] for each in paths)
        kept = next((name for name in partners if name in reasons), None)
        if kept is not None:
            for name in partners:
                reasons.setdefault(name, f"readers fuse it with {kept}, which stays in full precision")
    if len(reasons) == len(shapes):
        raise UsageError(
            f"nothing is left to quantize: {len(shapes)} linears found, all kept ({next(iter(reasons.values()))})"
        )
    general = LinearPlan(
        name="",
        shape=(0, 0),
        bits=recipe.bits,
        group_size=group_size,
        symmetric=recipe.symmetric,
        stored_dtype=stored_dtype,
        clip=recipe.clip,
        rounding=recipe.rounding,
        error_weight=recipe.error_weight,
        refinement=recipe.refinement,
        rounds=recipe.rounds,
    )
    blocks = []
    for index, structure in enumerate(structures):
        path = skeleton.block_path(index)
        plans = {}
        for view in structure.linears:
            name = f"{path}.{view.name}"
            columns = view.shape[1] if group_size == PER_CHANNEL else group_size
            plans[view.name] = replace(general, name=name, shape=view.shape, group_size=columns, keep=reasons.get(name))
        blocks.append(BlockPlan(index, path, structure, plans))
    return RunPlan(tuple(blocks), found.probe, group_size, stored_dtype)


def _why_not_on_disk(view: LinearView, parts: Mapping[str, slice] | None) -> str | None:
    """Why a linear cannot be written as one or several of its own, or None. parts: see `Skeleton.matrix_parts`."""
    if parts is None:
        return "several matrices in one tensor on disk, no reader takes those in few bits: stays in full precision"
    if not all(disk.endswith(".weight") for disk in parts):
        return "a parameter of its own, not the weight of a module: no reader would find it"
    if view.expert is None and len(parts) > 1:
        return f"{len(parts)} tensors on disk, one in the model"
    return None


def choose_group_size(asked: int | None, shapes: dict[str, tuple[int, int]]) -> int:
    """The size asked for (−1: one group a row), or the largest of 128, 64, 32 that divides every input (else 32).

    Raises FormatError where the size asked for does not divide an input, naming it and the sizes that would.
    """
    if asked is None:
        for size in DEFAULT_GROUP_SIZES:
            if all(columns % size == 0 for _, columns in shapes.values()):
                return size
        return DEFAULT_GROUP_SIZES[-1]
    if asked == PER_CHANNEL:
        return asked
    for name, (_, columns) in shapes.items():
        if columns % asked:
            fitting = [size for size in DEFAULT_GROUP_SIZES if all(k % size == 0 for _, k in shapes.values())]
            instead = f"use --group-size {' or '.join(map(str, fitting))}, or" if fitting else "no usual size does:"
            raise FormatError(
                f"--group-size {asked} does not divide the {columns} inputs of {name}; "
                f"{instead} leave that linear out with --ignore"
            )
    return asked
