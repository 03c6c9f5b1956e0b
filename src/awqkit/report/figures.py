"""A figure as a plain value, and what all figures share: layout, axes, ticks, numbers as text.

A figure is plotly's own JSON, built as dicts: nothing here imports plotly. Colors are names from `page.css`
("@chosen", "@ink" ...), which `page.js` replaces by the theme's values when it draws, and again when the theme changes.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

CATEGORIES = ("@category-1", "@category-2", "@category-3", "@category-4", "@category-5", "@category-6")
PLAIN, CHOSEN = "@plain", "@chosen"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_MOST_TICKS = 6
_ROW_PX, _AXES_PX = 30, 58


@dataclass(frozen=True, slots=True)
class LegendEntry:
    """A name and the color that stands for it. outlined: a ring in place of a filled mark."""

    label: str
    color: str
    outlined: bool = False


@dataclass(frozen=True, slots=True)
class Figure:
    """name: unique on the page. title: above the plot, may be empty. height_px: the page sets the width.

    legend: below the plot, for what only this figure shows.
    """

    name: str
    title: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    height_px: int
    legend: tuple[LegendEntry, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What `page.js` draws."""
        return {"name": self.name, "data": self.data, "layout": {**self.layout, "height": self.height_px}}


def plot_text(text: object) -> str:
    """`text` for labels inside a plot, where plotly reads a little HTML."""
    return html.escape(str(text), quote=False)


def layout(x: dict[str, Any], y: dict[str, Any], **rest: Any) -> dict[str, Any]:
    """A plotly layout; `x` and `y` are what `axis` takes. Nothing zooms or drags, so that a finger scrolls the page."""
    return {
        "font": {"family": _FONT, "size": 12, "color": "@ink"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 8, "r": 14, "t": 6, "b": 8},
        "showlegend": False,
        "dragmode": False,
        "hoverlabel": {
            "bgcolor": "@raised",
            "bordercolor": "@line",
            "font": {"family": _FONT, "size": 12, "color": "@ink"},
            "align": "left",
        },
        "barcornerradius": 2,
        "xaxis": axis(**x),
        "yaxis": axis(**y),
        **rest,
    }


def axis(title: str = "", *, grid: bool = True, **rest: Any) -> dict[str, Any]:
    """One plotly axis."""
    found: dict[str, Any] = {
        "automargin": True,
        "fixedrange": True,
        "showgrid": grid,
        "gridcolor": "@grid",
        "zeroline": False,
        "ticks": "",
        "tickfont": {"color": "@muted", "size": 12},
        **rest,
    }
    if title:
        found["title"] = {"text": title, "font": {"size": 12, "color": "@muted"}, "standoff": 8}
    return found


def log_percent_axis(values: Iterable[float]) -> dict[str, Any]:
    """A logarithmic axis over all of `values` > 0, with ticks in percent."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = math.log10(min(positive)), math.log10(max(positive))
    margin = max(0.08 * (high - low), 0.04)  # so that no mark is cut
    low, high = low - margin, high + margin
    ticks = [
        mantissa * 10.0**power
        for power in range(math.floor(low), math.ceil(high) + 1)
        for mantissa in (1, 2, 5)
        if low <= math.log10(mantissa * 10.0**power) <= high
    ]
    if len(ticks) > _MOST_TICKS:
        whole = [tick for tick in ticks if math.isclose(math.log10(tick), round(math.log10(tick)))]
        ticks = whole[:: math.ceil(len(whole) / _MOST_TICKS)]
    return {"type": "log", "range": [low, high], "tickvals": ticks, "ticktext": [percent_label(tick) for tick in ticks]}


def block_axis(num_blocks: int) -> dict[str, Any]:
    """An axis over the indices of blocks."""
    step = max(1, 5 * round(num_blocks / 25))
    return {"title": "block", "grid": False, "range": [-0.9, num_blocks - 0.1], "tick0": 0, "dtick": step}


def name_axis(labels: Sequence[str], size_px: int = 13) -> dict[str, Any]:
    """A vertical axis with a name for each row, the first on top; rows are numbered from 0."""
    return {
        "grid": False,
        "range": [len(labels) - 0.5, -0.5],
        "tickvals": list(range(len(labels))),
        "ticktext": [f"{plot_text(label)}\N{NO-BREAK SPACE}" for label in labels],
        "tickfont": {"color": "@ink", "size": size_px},
    }


def horizontal_bars(
    name: str,
    title: str,
    labels: Sequence[str],
    values: Sequence[float],
    texts: Sequence[str],
    colors: Sequence[str],
    what: str,
) -> Figure:
    """A bar for each label with its text at the end; `what` says what the axis counts."""
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": list(values),
        "y": list(range(len(labels))),
        "text": list(texts),
        "textposition": "outside",
        "cliponaxis": False,
        "textfont": {"color": "@ink"},
        "marker": {"color": list(colors)},
        "width": 0.62,
        "customdata": [plot_text(label) for label in labels],
        "hovertemplate": "%{customdata}: %{text}<extra></extra>",
    }
    low, high = min(0.0, *values), max(0.0, *values)
    room = 0.24 * (high - low or 1.0)  # for the text at the end of the longest bar
    x = {"title": what, "range": [low - (room if low < 0 else 0.0), high + room], "nticks": 5}
    return Figure(name, title, [trace], layout(x, name_axis(labels)), rows_px(len(labels)))


def rows_px(rows: int) -> int:
    """The height of a figure with so many named rows."""
    return _ROW_PX * rows + _AXES_PX


def percent(share: float | None, digits: int = 2) -> str:
    """A share in percent with so many significant digits: 0.00312 is "0.31 %"."""
    return "–" if share is None else f"{number(100 * share, digits)}\N{NO-BREAK SPACE}%"


def percent_label(share: float) -> str:
    """A round share for an axis or a legend: "0.1 %"."""
    return f"{100 * share:g}\N{NO-BREAK SPACE}%"


def percent_axis(title: str = "", **rest: Any) -> dict[str, Any]:
    """An axis from 0 whose values are percent."""
    return {"title": title, "ticksuffix": "\N{NO-BREAK SPACE}%", "rangemode": "tozero", **rest}


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, without an exponent where it can be read."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "∞" if value > 0 else "not a number"
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".replace("-", "−")


def seconds(value: float | None) -> str:
    """A duration: "< 0.1 s", "4.2 s", "3 min 05 s", "2 h 10 min"."""
    if value is None:
        return "–"
    space = "\N{NO-BREAK SPACE}"
    if value < 0.1:
        return f"<{space}0.1{space}s"
    if value < 60:
        return f"{number(value, 2)}{space}s"
    if value < 3600:
        return f"{int(value // 60)}{space}min {int(value % 60):02d}{space}s"
    return f"{int(value // 3600)}{space}h {int(value % 3600 // 60):02d}{space}min"


def data_size(size_bytes: int) -> str:
    """Bytes in powers of ten: "271 MB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{number(size_bytes / factor)}\N{NO-BREAK SPACE}{unit}"
    return f"{size_bytes}\N{NO-BREAK SPACE}B"
