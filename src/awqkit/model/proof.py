"""Proving folds: random powers of two, written into the real parameters, leave an exact fold's block as it was.

The output is then unchanged to the last bits, because a power of two commutes with every rounding on the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from awqkit.model.block_look import RunBlock, every_expert, handed, relative_change
from awqkit.model.channel_factors import with_one
from awqkit.model.matrices import matrix_of, parameter_of
from awqkit.model.structure import BlockStructure, Fold

PROOF_TOLERANCE = 1e-5  # largest change of the output under powers of two, relative to the block's own contribution


def prove(
    block: nn.Module, run: RunBlock, hidden: Tensor, structure: BlockStructure, folds: Sequence[Fold], seed: int = 0
) -> float:
    """The largest change of the block's output, relative to its contribution, under random powers of two.

    The folds are exact where this is at most PROOF_TOLERANCE: all at once, each with factors of its own. With
    experts a second run reaches them all. Parameters are restored exactly.
    """
    runs = [run, every_expert(run, structure.experts)] if structure.experts else [run]
    plain = [handed(each()) for each in runs]
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(block.named_parameters())
    touched = {name for fold in folds for name in fold.producer}
    touched |= {structure.linear(name).weight for fold in folds for name in fold.consumers}
    saved = {name: parameters[name].data for name in sorted(map(parameter_of, touched))}
    scaled = {name: value.clone() for name, value in saved.items()}
    factors = _powers_of_two([fold.num_channels for fold in folds], generator, hidden.device)
    for fold, factor in zip(folds, factors, strict=True):
        _scale_by(scaled, structure, fold, factor)
    try:
        for name, value in scaled.items():
            parameters[name].data = value
        changed = [handed(each()) for each in runs]
    finally:
        for name, value in saved.items():
            parameters[name].data = value
    return max(relative_change(after, before, hidden) for after, before in zip(changed, plain, strict=True))


def proved_together(structure: BlockStructure) -> list[tuple[Fold, ...]]:
    """The folds of a structure in groups that are exact together or not: those of all experts' like parts are one."""
    return _grouped(structure, structure.folds)


def _grouped(structure: BlockStructure, folds: Sequence[Fold]) -> list[tuple[Fold, ...]]:
    groups: dict[tuple[str, ...], list[Fold]] = {}
    for fold in folds:
        expert = structure.linear(fold.producer_linear).expert if fold.producer_linear else None
        key = (fold.label,) if expert is None else (expert.experts, expert.part)
        groups.setdefault(key, []).append(fold)
    return [tuple(group) for group in groups.values()]


def proof_errors(
    block: nn.Module, run: RunBlock, hidden: Tensor, structure: BlockStructure, folds: Sequence[Fold]
) -> list[float]:
    """`prove` for each fold: of all at once where that is exact, else of each group, else of one after the other."""
    error = prove(block, run, hidden, structure, folds)
    if error <= PROOF_TOLERANCE or len(folds) == 1:
        return [error] * len(folds)
    groups = _grouped(structure, folds)
    parts = groups if len(groups) > 1 else [(fold,) for fold in folds]
    found = {
        id(fold): error
        for part in parts
        for fold, error in zip(part, proof_errors(block, run, hidden, structure, part), strict=True)
    }
    return [found[id(fold)] for fold in folds]


def _powers_of_two(channels: Sequence[int], generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
    """For each number of channels as many random powers of two; they go to the device together."""
    exponents = torch.randint(-2, 3, (sum(channels),), generator=generator)
    return torch.exp2(exponents.float()).to(device).split(list(channels))


def _scale_by(parameters: Mapping[str, Tensor], structure: BlockStructure, fold: Fold, factor: Tensor) -> None:
    """Multiply a producer by powers of two, and divide its consumers by them, in place."""
    factor = torch.where(fold.read, factor, 1.0)
    undo = 1.0 / factor
    after, undone = with_one(undo), dict[int, Tensor]()
    rows = structure.linear(fold.producer_linear) if fold.producer_linear else None
    for name in fold.producer:
        value = matrix_of(parameters, name)
        value = rows.oriented(value) if rows is not None and name == rows.weight else value
        value.copy_(divided(value, undo, name == fold.offset))
    for consumer in fold.consumers:
        view, channel_of = structure.linear(consumer), fold.channel_of[consumer]
        if id(channel_of) not in undone:  # q, k and v read one input
            undone[id(channel_of)] = after[channel_of]
        view.oriented(matrix_of(parameters, view.weight)).mul_(undone[id(channel_of)])


def divided(value: Tensor, scale: Tensor, offset: bool) -> Tensor:
    """A producer's parameter with its first dimension divided by `scale`; `offset` for the w of a norm by 1 + w."""
    scale = scale.reshape(-1, *(1,) * (value.dim() - 1))
    return (1.0 + value) / scale - 1.0 if offset else value / scale
