"""A run or a comparison as one self-contained page: what is put on it, in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from awqkit.report.analysis import Json, fallbacks
from awqkit.report.figures import data_size, number, percent
from awqkit.report.page import Fact, Heading, page
from awqkit.report.run_sections import (
    error_section,
    experts_section,
    ratio_section,
    saliency_section,
    scale_section,
    search_section,
)
from awqkit.report.sections import Section, caution_section, comparison_section, time_section, undone_section

Row = Mapping[str, Any]


def render_html(report: Json | None, timings: Mapping[str, Any] | None, comparison: Sequence[Row] | None) -> str:
    """The page, which loads nothing from outside.

    report: the content of awqkit.json, or None for a comparison alone. timings: that of awqkit-timings.json, or None.
    comparison: rows with method, bits, perplexity, kl, top1_agreement, seconds, bits_per_weight and perhaps text, the
    name of the text they were measured on; the original model's row has no kl. Or None.
    """
    sections = [comparison_section(comparison)] if comparison else []
    if report is not None:
        sections += _run_sections(report, timings)
    return page(_heading(report, comparison), sections, _settings(report), _closing(report))


def _run_sections(report: Json, timings: Mapping[str, Any] | None) -> list[Section]:
    found: list[Section | None] = []
    if any(block["linears"] for block in report["blocks"]):
        found += [error_section(report), experts_section(report), ratio_section(report)]
    found += [scale_section(report), search_section(report), saliency_section(report)]
    if timings is not None and timings.get("stages"):
        found.append(time_section(timings))
    found += [undone_section(report), caution_section(report)]
    return [section for section in found if section is not None]


def _heading(report: Json | None, comparison: Sequence[Row] | None) -> Heading:
    if report is None:
        methods = dict.fromkeys(str(row["method"]) for row in comparison or ())
        return Heading("awqkit comparison", "Methods compared", ", ".join(methods), ())
    recipe = report["recipe"]
    grid = "symmetric" if recipe["symmetric"] else "asymmetric"
    size = report["group_size"]
    groups = "one group per row" if size == -1 else f"groups of {size}"
    subtitle = f"{recipe['name']}, {recipe['bits']} bits, {groups}, {grid}, format {recipe['format']}"
    return Heading("awqkit report", report["model"], subtitle, _facts(report))


def _facts(report: Json) -> tuple[Fact, ...]:
    facts = [
        Fact("bits per weight", number(report["bits_per_weight"])),
        Fact("tensor data", data_size(report["written_bytes"]), f"{data_size(report['source_bytes'])} before"),
    ]
    if report["mean_output_errors"]:
        facts.append(_error_fact("output error, mean", *report["mean_output_errors"]))
    held = [block for block in report["blocks"] if block["held_out_error"] is not None]
    if held:
        plain = sum(block["held_out_error_nearest"] for block in held) / len(held)
        chosen = sum(block["held_out_error"] for block in held) / len(held)
        facts.append(_error_fact("held-out block error", plain, chosen))
    folds = [fold for block in report["blocks"] for fold in block["folds"]]
    if folds:
        used = sum(fold["fallback"] is None for fold in folds)
        facts.append(Fact("folds in use", f"{used} of {len(folds)}", "each proved exact"))
    facts.append(Fact("fell back", str(len(fallbacks(report)))))
    return tuple(facts)


def _error_fact(label: str, plain: float, chosen: float) -> Fact:
    return Fact(label, percent(chosen, 3), f"{percent(plain, 3)} with plain rounding")


def _settings(report: Json | None) -> list[tuple[str, str]]:
    if report is None:
        return []
    return [
        ("model", report["model"]),
        ("calibration", _calibration_text(report["calibration"])),
        *((name.replace("_", " "), _value_text(value)) for name, value in _recipe_settings(report)),
        ("dtype of the rest", report["stored_dtype"]),
        ("device", report["device"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())),
    ]


def _recipe_settings(report: Json) -> list[tuple[str, object]]:
    """The recipe without what stands elsewhere on the page, with the group size that was chosen."""
    recipe = {**report["recipe"], "group_size": report["group_size"]}
    return [
        (name, value) for name, value in recipe.items() if name not in ("calibration", "samples", "seq_len", "dtype")
    ]


def _calibration_text(used: Json | None) -> str:
    if used is None:
        return "none needed"
    rows = f"{used['rows']} rows of {used['tokens_per_row']} tokens"
    own = used.get("generated_rows", 0)
    beside = f", and {own} that the model wrote itself" if own else ""
    return f"{used['source']}: {rows}, {used['held_out_rows']} held out{beside}"


def _value_text(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _closing(report: Json | None) -> str:
    version = "" if report is None else f" {report['versions']['awqkit']}"
    return f"Made by awqkit{version}. This page is complete in itself and loads nothing."
