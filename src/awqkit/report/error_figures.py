"""Figures of the errors of one run: every linear before and after, and what became of output and weight errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from awqkit.report.analysis import Json, linears_by_type, short_names
from awqkit.report.figures import (
    CHOSEN,
    PLAIN,
    Figure,
    LegendEntry,
    block_axis,
    layout,
    log_percent_axis,
    name_axis,
    percent,
    plot_text,
)

ERROR_LEGEND = (LegendEntry("plain rounding", PLAIN, outlined=True), LegendEntry("as written", CHOSEN))
RATIO_LIMIT = 2  # heat maps show 2^-2 ... 2^2, a quarter to four times
_PANEL_PX, _MAP_ROW_PX, _MAP_AXES_PX = 190, 24, 58


def error_panels(report: Json) -> list[Figure]:
    """For each type of linear the output error of every linear, from plain rounding to what was written.

    Where a block has several linears of a type (experts), each point is their mean. Weight errors in place of output
    errors where no calibration text was read.
    """
    before, after = error_keys(report)
    types = linears_by_type(report)
    means = {name: block_means(linears, (before, after)) for name, linears in types.items()}
    values = [value for by_block in means.values() for pair in by_block.values() for value in pair]
    shared = log_percent_axis(values)
    names = short_names(types)
    return [
        _error_panel(f"error-{index}", names[name], by_block, shared, len(report["blocks"]))
        for index, (name, by_block) in enumerate(means.items())
    ]


def _error_panel(
    name: str, title: str, by_block: dict[int, list[float]], shared: dict[str, Any], num_blocks: int
) -> Figure:
    blocks = list(by_block)
    first, last = ([pair[side] for pair in by_block.values()] for side in (0, 1))
    hover = [f"block {block}<br>{percent(a)} → {percent(b)}" for block, a, b in zip(blocks, first, last, strict=True)]
    # A break after each pair makes one trace of many strokes.
    strokes = [(block, value) for block, pair in by_block.items() for value in (*pair, None)]
    marks = {"type": "scatter", "mode": "markers", "x": blocks, "hovertext": hover, "hoverinfo": "text"}
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [block for block, _ in strokes],
            "y": [value for _, value in strokes],
            "line": {"color": "@line", "width": 2},
            "hoverinfo": "skip",
        },
        {**marks, "y": first, "marker": {"color": "@page", "size": 6, "line": {"color": PLAIN, "width": 1.5}}},
        {**marks, "y": last, "marker": {"color": CHOSEN, "size": 7}},
    ]
    return Figure(name, title, data, layout(block_axis(num_blocks), shared), _PANEL_PX)


def ratio_maps(report: Json) -> list[Figure]:
    """Heat maps by block and type of linear: error as written ÷ plain rounding's, of the output and of the weight."""
    types = linears_by_type(report)
    names = short_names(types)
    found = []
    for name, title, kind in (
        ("map-output", "Output error", "output_error"),
        ("map-weight", "Weight error", "weight_error"),
    ):
        pair = (f"{kind}_nearest", kind)
        rows = [block_means(linears, pair) for linears in types.values()]
        if any(rows):
            found.append(_ratio_map(name, title, list(names.values()), rows, len(report["blocks"])))
    return found


def _ratio_map(name: str, title: str, types: list[str], rows: list[dict[int, list[float]]], num_blocks: int) -> Figure:
    cells = [[_log2_ratio(row.get(block)) for block in range(num_blocks)] for row in rows]
    hover = [
        [_ratio_text(label, block, row.get(block)) for block in range(num_blocks)]
        for label, row in zip(types, rows, strict=True)
    ]
    trace = {
        "type": "heatmap",
        "x": list(range(num_blocks)),
        "y": list(range(len(types))),
        "z": cells,
        "zmin": -RATIO_LIMIT,
        "zmax": RATIO_LIMIT,
        "colorscale": [[0, "@low"], [0.5, "@middle"], [1, "@high"]],
        "showscale": False,
        "xgap": 1,
        "ygap": 1,
        "text": hover,
        "hovertemplate": "%{text}<extra></extra>",
        "hoverongaps": False,
    }
    x = {**block_axis(num_blocks), "range": [-0.5, num_blocks - 0.5]}
    return Figure(name, title, [trace], layout(x, name_axis(types, 12)), _MAP_ROW_PX * len(types) + _MAP_AXES_PX)


def error_keys(report: Json) -> tuple[str, str]:
    """The Decision's fields for the error before and after: of outputs where text was read, else of weights."""
    linears = [linear for block in report["blocks"] for linear in block["linears"]]
    measured = any(linear["output_error"] is not None for linear in linears)
    kind = "output_error" if measured else "weight_error"
    return f"{kind}_nearest", kind


def block_means(linears: Sequence[tuple[int, Json]], keys: Sequence[str]) -> dict[int, list[float]]:
    """Block index -> mean of each of `keys` over its linears that have them."""
    by_block: dict[int, list[Json]] = {}
    for block, linear in linears:
        if all(linear[key] is not None for key in keys):
            by_block.setdefault(block, []).append(linear)
    return {
        block: [sum(linear[key] for linear in found) / len(found) for key in keys] for block, found in by_block.items()
    }


def _log2_ratio(pair: list[float] | None) -> float | None:
    if pair is None or min(pair) <= 0:
        return None
    return round(math.log2(pair[1] / pair[0]), 4)


def _ratio_text(label: str, block: int, pair: list[float] | None) -> str:
    if pair is None:
        return ""
    ratio = f"{pair[1] / pair[0]:.2f} ×" if pair[0] > 0 else "–"
    return f"{plot_text(label)}, block {block}<br>{percent(pair[0])} → {percent(pair[1])}<br>{ratio} plain rounding's"
