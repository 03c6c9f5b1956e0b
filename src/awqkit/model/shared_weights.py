"""Blocks that compute with one and the same parameter: what one block stores would change the others."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from awqkit.model.matrices import parameter_of
from awqkit.model.structure import BlockStructure, Fold, LinearView, Refusal


def without_shared_folds(structure: BlockStructure, shared: Collection[str]) -> BlockStructure:
    """The structure with every fold refused that would change a shared parameter. shared: names inside the block."""
    if not shared:
        return structure
    folds, refusals = [], list(structure.refusals)
    for fold in structure.folds:
        name = next((name for name in _changed(structure, fold) if name in shared), None)
        if name is None:
            folds.append(fold)
        else:
            reason = f"it would change {name}, which other blocks compute with as well"
            refusals.append(Refusal(fold.label, fold.consumers, reason))
    return replace(structure, folds=tuple(folds), refusals=tuple(refusals))


def why_shared_stays(view: LinearView, shared: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why a linear stays in full precision, or None. shared: see `Skeleton.shared_by`."""
    owners = shared.get(parameter_of(view.weight)) or shared.get(view.bias or "")
    if owners is None:
        return None
    *others, last = map(str, owners)
    return f"shared by blocks {', '.join(others)} and {last}: stays in full precision"


def _changed(structure: BlockStructure, fold: Fold) -> list[str]:
    """Every parameter that a scale of this fold is written to."""
    readers = (structure.linear(name).weight for name in fold.consumers)
    return [parameter_of(name) for name in (*fold.producer, *readers)]
