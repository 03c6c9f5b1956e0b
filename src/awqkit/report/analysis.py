"""The scale analysis and the fallbacks of a run, from the content of its awqkit.json.

Plain values in and out, so that a finished checkpoint can be looked at without a model and without torch. Knows no
page and no terminal: `page.py` and `awqkit inspect` draw what is found here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Json = Mapping[str, Any]
MEASURES = ("mean", "min", "max", "std", "max_over_mean", "share_above_5x", "share_above_2x", "share_below_half")


@dataclass(frozen=True, slots=True)
class ScaleRow:
    """The channel scales of one type of fold over all blocks.

    fold: the producer within its block. consumers: what reads it. found, in_use: folds. channels: of those in use.
    mean, std, max_over_mean and the shares are means over the folds in use, weighted by channels; min and max are
    the extremes. All of them are None where no fold is in use.
    """

    fold: str
    consumers: tuple[str, ...]
    found: int
    in_use: int
    channels: int
    mean: float | None
    min: float | None
    max: float | None
    std: float | None
    max_over_mean: float | None
    share_above_5x: float | None
    share_above_2x: float | None
    share_below_half: float | None
    log2_counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AlphaRow:
    """The search over alpha for one type of fold: units searched, units at s = 1, units won by each family.

    counts: scaled units by alpha. median: of the folds' medians, None where nothing was scaled; min, max: extremes.
    """

    fold: str
    units: int
    identity: int
    families: dict[str, int]
    min: float | None
    median: float | None
    max: float | None
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ClipRow:
    """The share of the groups' ranges that was kept, for one type of linear: over its linears' means."""

    linear: str
    linears: int
    mean: float
    min: float
    max: float
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fallback:
    """One choice that was undone or refused."""

    where: str
    reason: str


def type_of(name: str, path: str = "") -> str:
    """A linear's or producer's name without its block and its numbers, which blocks and experts have in common.

    >>> type_of("model.layers.3.mlp.experts.17.up_proj", "model.layers.3")
    'mlp.experts.*.up_proj'
    """
    inner = name.removeprefix(f"{path}.") if path else name
    return ".".join("*" if part.isdigit() else part for part in inner.split("."))


def short_names(types: Iterable[str]) -> dict[str, str]:
    """The last part of each type's name where that is enough to tell it from the others, else the whole name."""
    known = list(dict.fromkeys(types))
    last = [name.rpartition(".")[2] for name in known]
    return {name: short if last.count(short) == 1 else name for name, short in zip(known, last, strict=True)}


def linears_by_type(report: Json) -> dict[str, list[tuple[int, Json]]]:
    """(index of the block, the linear's Decision) by the type of linear, in the order of the file."""
    found: dict[str, list[tuple[int, Json]]] = {}
    for block in report["blocks"]:
        for linear in block["linears"]:
            found.setdefault(type_of(linear["name"], block["path"]), []).append((block["index"], linear))
    return found


def folds_by_type(report: Json) -> dict[str, list[Json]]:
    """The Decisions on folds by the type of producer, in the order of the file."""
    found: dict[str, list[Json]] = {}
    for block in report["blocks"]:
        for fold in block["folds"]:
            found.setdefault(type_of(fold["producer"]), []).append(fold)
    return found


def scale_rows(report: Json) -> list[ScaleRow]:
    """One row for each type of fold for which a scale was searched."""
    rows = []
    for name, folds in folds_by_type(report).items():
        if not any(fold.get("scale") for fold in folds):
            continue
        used = [fold for fold in folds if fold.get("scale") and fold["fallback"] is None]
        weights = [fold["num_channels"] for fold in used]
        shapes = [fold["scale"] for fold in used]
        values = {key: _weighted_mean([shape[key] for shape in shapes], weights) for key in MEASURES}
        values["min"] = min((shape["min"] for shape in shapes), default=None)
        values["max"] = max((shape["max"] for shape in shapes), default=None)
        consumers = dict.fromkeys(type_of(consumer) for fold in folds for consumer in fold["consumers"])
        rows.append(
            ScaleRow(
                fold=name,
                consumers=tuple(consumers),
                found=len(folds),
                in_use=len(used),
                channels=sum(weights),
                log2_counts=added(shape["log2_counts"] for shape in shapes),
                **values,
            )
        )
    return rows


def alpha_rows(report: Json) -> list[AlphaRow]:
    """One row for each type of fold for which alpha was searched; folds that fell back are left out."""
    rows = []
    for name, folds in folds_by_type(report).items():
        searches = [fold["alpha"] for fold in folds if fold["alpha"] is not None and fold["fallback"] is None]
        if not searches:
            continue
        families: dict[str, int] = {}
        for search in searches:
            for family, won in search["families"].items():
                families[family] = families.get(family, 0) + won
        scaled = [search for search in searches if search["alpha_median"] is not None]
        rows.append(
            AlphaRow(
                fold=name,
                units=sum(search["num_units"] for search in searches),
                identity=sum(search["num_identity"] for search in searches),
                families=families,
                min=min((search["alpha_min"] for search in scaled), default=None),
                median=_median([search["alpha_median"] for search in scaled]),
                max=max((search["alpha_max"] for search in scaled), default=None),
                counts=added(search.get("counts", ()) for search in searches),
            )
        )
    return rows


def clip_rows(report: Json) -> list[ClipRow]:
    """One row for each type of linear; none where the recipe does not clip."""
    if report["recipe"]["clip"] == "none":
        return []
    rows = []
    for name, linears in linears_by_type(report).items():
        means = [linear["clip_mean"] for _, linear in linears]
        counts = added(linear.get("clip_counts", ()) for _, linear in linears)
        rows.append(ClipRow(name, len(means), sum(means) / len(means), min(means), max(means), counts))
    return rows


def fallbacks(report: Json) -> list[Fallback]:
    """Every choice that was undone or refused. A block that went back as a whole stands for its folds."""
    run_wide = {
        "calibration": (report.get("calibration") or {}).get("not_generated"),
        "tuning": (report.get("tuning") or {}).get("fallback"),
    }
    found = [Fallback(where, reason) for where, reason in run_wide.items() if reason]
    for block in report["blocks"]:
        whole = block["fallback"]
        if whole:
            found.append(Fallback(block["path"], whole))
        parts = [(f"{block['path']}.{fold['producer']}", fold["fallback"]) for fold in block["folds"]]
        parts += [(linear["name"], linear["fallback"]) for linear in block["linears"]]
        found += [Fallback(where, reason) for where, reason in parts if reason and reason != whole]
    return found


def added(counts: Iterable[Iterable[int]]) -> tuple[int, ...]:
    """Histograms over the same points as one; those without counts are left out."""
    return tuple(sum(column) for column in zip(*filter(None, map(tuple, counts)), strict=True))


def _weighted_mean(values: list[float], weights: list[int]) -> float | None:
    total = sum(weights)
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / total if total else None


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
