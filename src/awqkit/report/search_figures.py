"""Figures of the searches of one run: channel scales, alpha, clip, saliency; and where the time went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from awqkit.decisions import ALPHA_POINTS, CLIP_POINTS, LOG2_SCALE_POINTS
from awqkit.report.analysis import AlphaRow, ClipRow, ScaleRow, added, short_names
from awqkit.report.figures import (
    CATEGORIES,
    CHOSEN,
    Figure,
    LegendEntry,
    horizontal_bars,
    layout,
    name_axis,
    percent_axis,
    percent_label,
    plot_text,
    rows_px,
    seconds,
)

SALIENCY_COLORS = ("@step-1", "@step-2", "@step-3", "@step-4")
_PANEL_PX, _HISTOGRAM_PX = 190, 260


def scale_panels(rows: Sequence[ScaleRow]) -> list[Figure]:
    """For each type of fold how its channel scales are spread, on a logarithmic axis."""
    shown = [row for row in rows if sum(row.log2_counts)]
    used = [point for row in shown for point, count in zip(LOG2_SCALE_POINTS, row.log2_counts, strict=True) if count]
    reach = max([1.2, *(abs(point) + 0.25 for point in used)])
    octaves = range(-math.floor(reach), math.floor(reach) + 1)
    x = {
        "range": [-reach, reach],
        "grid": False,
        "tickvals": list(octaves),
        "ticktext": [f"1/{2**-octave}" if octave < 0 else str(2**octave) for octave in octaves],
    }
    names = short_names(row.fold for row in shown)
    return [_scale_panel(f"scale-{index}", names[row.fold], row, x) for index, row in enumerate(shown)]


def _scale_panel(name: str, title: str, row: ScaleRow, x: dict[str, Any]) -> Figure:
    total = sum(row.log2_counts)
    shares = [100 * count / total for count in row.log2_counts]
    trace = {
        "type": "bar",
        "x": list(LOG2_SCALE_POINTS),
        "y": shares,
        "marker": {"color": CHOSEN},
        "width": 0.105,
        "hovertext": [
            f"s ≈ {2**point:.2f}<br>{share:.2g}\N{NO-BREAK SPACE}% of the channels"
            for point, share in zip(LOG2_SCALE_POINTS, shares, strict=True)
        ],
        "hoverinfo": "text",
    }
    identity = {"type": "line", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "yref": "paper"}
    shapes = [{**identity, "line": {"color": "@muted", "width": 1, "dash": "dot"}}]
    drawn = layout({**x, "title": "s"}, percent_axis(nticks=4), shapes=shapes, barcornerradius=0)
    return Figure(name, title, [trace], drawn, _PANEL_PX)


def alpha_bars(rows: Sequence[AlphaRow]) -> Figure | None:
    """Search units by alpha, the types of fold on top of each other; None where the file has no counts."""
    shown = [row for row in rows if sum(row.counts)]
    if not shown:
        return None
    names = short_names(row.fold for row in rows)
    data = [
        {
            "type": "bar",
            "x": list(ALPHA_POINTS),
            "y": list(row.counts),
            "marker": {"color": color},
            "width": 0.04,
            "hovertemplate": f"{plot_text(names[row.fold])}<br>α = %{{x:.2f}}: %{{y}} search units<extra></extra>",
        }
        for row, color in zip(rows, fold_colors(rows), strict=True)
        if sum(row.counts)
    ]
    x = {"title": "α", "range": [-0.04, 1.04], "dtick": 0.2, "grid": False}
    drawn = layout(x, {"title": "search units", "nticks": 5}, barmode="stack", barcornerradius=0)
    return Figure("alpha", "α of the search units", data, drawn, _HISTOGRAM_PX, alpha_legend(rows))


def fold_colors(rows: Sequence[AlphaRow]) -> list[str]:
    """A color for each type of fold; the last one serves all that are too many."""
    return [CATEGORIES[min(index, len(CATEGORIES) - 1)] for index in range(len(rows))]


def alpha_legend(rows: Sequence[AlphaRow]) -> tuple[LegendEntry, ...]:
    """The colors of `alpha_bars`."""
    names = short_names(row.fold for row in rows)
    return tuple(LegendEntry(names[row.fold], color) for row, color in zip(rows, fold_colors(rows), strict=True))


def clip_bars(rows: Sequence[ClipRow]) -> Figure | None:
    """Both ends of all groups by the share of the range that was kept; None where the file has no counts."""
    counts = added(row.counts for row in rows)
    if not sum(counts):
        return None
    shares = [100 * count / sum(counts) for count in counts]
    trace = {
        "type": "bar",
        "x": [100 * point for point in CLIP_POINTS],
        "y": shares,
        "marker": {"color": CHOSEN},
        "width": 2,
        "hovertemplate": "%{x:.1f} % kept: %{y:.2g} % of the ends<extra></extra>",
    }
    x = percent_axis("share of the range that was kept", range=[48, 102], dtick=10, grid=False)
    drawn = layout(x, percent_axis("ends of groups", nticks=5), barcornerradius=0)
    return Figure("clip", "Clip", [trace], drawn, _HISTOGRAM_PX)


def saliency_dots(by_type: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """For each type of linear the share of the output error that its most salient channels carry."""
    names = short_names(by_type)
    labels = list(names.values())
    rows = list(by_type.values())
    strokes = [(share, y) for y, shares in enumerate(rows) for share in (shares[0][1], shares[-1][1], None)]
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [share and 100 * share for share, _ in strokes],
            "y": [y for _, y in strokes],
            "line": {"color": "@line", "width": 2},
            "hoverinfo": "skip",
        }
    ]
    for index, (channels, _) in enumerate(rows[0]):
        carried = [100 * shares[index][1] for shares in rows]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": carried,
                "y": list(range(len(labels))),
                "marker": {"color": SALIENCY_COLORS[index], "size": 11, "line": {"color": "@page", "width": 1}},
                "hovertext": [
                    f"{plot_text(label)}<br>{percent_label(channels)} of the channels: {share:.2g} % of the error"
                    for label, share in zip(labels, carried, strict=True)
                ],
                "hoverinfo": "text",
            }
        )
    x = percent_axis("share of plain rounding's output error", nticks=6)
    return Figure("saliency", "", data, layout(x, name_axis(labels, 12)), rows_px(len(labels)))


def stage_bars(stages: Mapping[str, float]) -> Figure:
    """Seconds by stage, in the order of the run."""
    names, values = list(stages), list(stages.values())
    return horizontal_bars(
        "stages", "", names, values, [seconds(value) for value in values], [CHOSEN] * len(names), "seconds"
    )
