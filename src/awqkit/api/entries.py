"""Which of the recipes to compare a model can have: for each a plan, and what its weights would take on disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from awqkit.api.contenders import NamedRecipe
from awqkit.api.quantize import stored_dtype_of
from awqkit.checkpoint.tensor_source import TensorSource
from awqkit.errors import AwqkitError, FormatError, UsageError
from awqkit.formats.format import FORMATS, Format, format_for
from awqkit.formats.scheme import Scheme
from awqkit.model.matrices import parameter_of
from awqkit.model.skeleton import Skeleton
from awqkit.pipeline.course import Contender
from awqkit.pipeline.plan import RunPlan, look_at, plan_linears
from awqkit.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Entry:
    """A method that the model can have."""

    method: str
    contender: Contender
    bits_per_weight: float


def entries_for(
    source: TensorSource, skeleton: Skeleton, named: Sequence[NamedRecipe], device: torch.device
) -> tuple[list[Entry], list[str]]:
    """A plan for every method, and a line for each that the model cannot have. Raises where that is all of them."""
    found = look_at(skeleton, device)
    entered: list[Entry] = []
    failed: list[tuple[str, AwqkitError]] = []
    for each in named:
        try:
            recipe, written = _storable(each.recipe)
            stored_dtype = stored_dtype_of(source, recipe)
            plan = plan_linears(
                skeleton,
                found,
                recipe,
                stored_dtype,
                written.why_not_held,
                written.fused_partners,
                written.why_shadowed,
            )
        except (FormatError, UsageError) as error:
            failed.append((each.label, error))
            continue
        contender = Contender(each.label, recipe, plan)
        entered.append(Entry(each.method, contender, _bits_per_weight(plan, recipe, written)))
    if not entered:
        raise failed[0][1]
    return entered, [f"{label} skipped: {error}" for label, error in failed]


def _storable(recipe: Recipe) -> tuple[Recipe, Format]:
    """The recipe in its own format or, where that cannot hold it, in the first that can: which linears stay whole, and
    how many bits a weight takes, depend on it. Raises FormatError where none can."""
    scheme = Scheme.of(recipe)
    for name in (recipe.format, *FORMATS):
        if FORMATS[name].why_not(scheme) is None:
            return replace(recipe, format=name), FORMATS[name]
    return recipe, format_for(recipe)


def _bits_per_weight(plan: RunPlan, recipe: Recipe, written: Format) -> float:
    scheme = Scheme.of(recipe, plan.group_size)
    num_bytes, num_weights = 0, 0
    for linear in plan.linears:
        if linear.keep is None:
            parts = written.tensor_specs(linear.name, *linear.shape, scheme, plan.stored_dtype)
            num_bytes += sum(dtype.itemsize * math.prod(shape) for dtype, shape in parts.values())
            num_weights += math.prod(linear.shape)
    return 8 * num_bytes / num_weights


def original_bits(source: TensorSource, skeleton: Skeleton, plan: RunPlan) -> int:
    """Bits of a block's weights on disk, with their scales where they have few."""
    block = plan.blocks[0]
    disk = skeleton.disk_names(f"{block.path}.{parameter_of(block.structure.linears[0].weight)}")[0]
    return round(8 * source.stored_bytes(disk) / math.prod(source.shape(disk)))
