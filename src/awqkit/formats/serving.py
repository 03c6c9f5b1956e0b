"""What vLLM and SGLang do to linears when they load them: which ones they fuse, and how ranks split them.

They know linears by the last part of the path, so this does too; the quantizer itself never looks at names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from awqkit.errors import FormatError

PARALLEL_SIZES = (2, 4, 8)

# Parts that one fused linear is made of, and its name, per parent.
_FUSED = (
    (("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    (("gate_proj", "up_proj"), "gate_up_proj"),
    (("w1", "w3"), "gate_up_proj"),
    (("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj"),
)
# All experts of a block become one stack with one scheme.
_EXPERT = re.compile(r"(?P<stack>.*\.experts)\.\d+\.[^.]+")
# Linears whose inputs, not outputs, are split over the ranks.
_ROW_PARALLEL = frozenset(
    ("o_proj", "down_proj", "out_proj", "w2", "wo", "c_proj", "fc2", "fc_out", "dense", "dense_4h_to_h")
)


@dataclass(frozen=True, slots=True)
class FusedUnit:
    """Linears `parts` that a server holds as one module `path`; they must agree on precision."""

    path: str
    parts: tuple[str, ...]


def fused_units(linears: Iterable[str]) -> list[FusedUnit]:
    """The units of more than one part among `linears` (full paths), in the order of their first part."""
    units: dict[str, list[str]] = {}
    for linear in linears:
        path = _unit_path(linear)
        if path is not None:
            units.setdefault(path, []).append(linear)
    return [FusedUnit(path, tuple(parts)) for path, parts in units.items() if len(parts) > 1]


def fused_partners(linears: Iterable[str]) -> list[tuple[str, ...]]:
    """The tuples of linears that must agree on precision and group size, see `fused_units`.

    >>> fused_partners(["m.q_proj", "m.o_proj", "m.k_proj", "m.v_proj"])
    [('m.q_proj', 'm.k_proj', 'm.v_proj')]
    """
    return [unit.parts for unit in fused_units(linears)]


def refuse_split(units: Sequence[FusedUnit], kept: Collection[str]) -> None:
    """Raises FormatError where some parts of a unit are `kept` in full precision and others are not."""
    for unit in units:
        inside = [part for part in unit.parts if part in kept]
        outside = [part for part in unit.parts if part not in kept]
        if inside and outside:
            raise FormatError(
                f"{inside[0]} is kept and {outside[0]} quantized, but servers hold both in one {unit.path}: "
                "keep all of its parts (--ignore) or none"
            )


def tensor_parallel_cautions(linears: Mapping[str, tuple[int, int]], group_size: int, word_columns: int) -> list[str]:
    """A line for each tensor-parallel size of 2, 4, 8 that would not load, with the first linear at fault.

    linears: path -> (out_features, in_features). A rank needs whole groups of the inputs of a row-parallel
    linear, and whole words (`word_columns` outputs) of any other.
    """
    cautions = []
    for ranks in PARALLEL_SIZES:
        reasons = (_does_not_split(name, shape, ranks, group_size, word_columns) for name, shape in linears.items())
        reason = next((reason for reason in reasons if reason), None)
        if reason:
            cautions.append(f"tensor parallelism of {ranks} would not load this checkpoint: {reason}")
    return cautions


def holds_experts(linears: Iterable[str]) -> bool:
    """Whether any of these linears is an expert's."""
    return any(_EXPERT.fullmatch(linear) for linear in linears)


def _unit_path(linear: str) -> str | None:
    expert = _EXPERT.fullmatch(linear)
    if expert:
        return expert["stack"]
    parent, dot, name = linear.rpartition(".")
    return next((parent + dot + fused for parts, fused in _FUSED if name in parts), None)


def _does_not_split(name: str, shape: Sequence[int], ranks: int, group_size: int, word_columns: int) -> str | None:
    side, size, unit = ("outputs", shape[0], word_columns)
    if name.rpartition(".")[2] in _ROW_PARALLEL:
        side, size, unit = ("inputs", shape[1], group_size)
    if size % (ranks * unit) == 0:
        return None
    return f"{name} has {size} {side}, which do not split into {ranks} parts of whole {unit}s"
