"""A section of the page as a plain value, and those that are not about errors or searches.

All text is plain; `page.py` escapes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from awqkit.report.analysis import Json, fallbacks
from awqkit.report.comparison_figures import Row, comparison_figures, comparison_legend, is_original
from awqkit.report.figures import Figure, LegendEntry, number, percent, seconds
from awqkit.report.search_figures import stage_bars

ONE, PAIR, PANELS = "one", "pair", "panels"  # how figures share the width
MOST_ROWS = 500  # of a table; a model of experts has tens of thousands of linears


@dataclass(frozen=True, slots=True)
class Table:
    """columns and rows of plain text; the first `text_columns` are flush left. folded: shown when asked for."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 1
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """One section. lead: paragraphs. arrangement: ONE, PAIR or PANELS. ramp: labels of a heat map's color scale."""

    name: str
    title: str
    lead: tuple[str, ...]
    figures: tuple[Figure, ...] = ()
    arrangement: str = ONE
    legend: tuple[LegendEntry, ...] = ()
    ramp: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()


def comparison_section(rows: Sequence[Row]) -> Section:
    """Perplexity and KL by method."""
    rtn = {(row.get("text"), row["bits"]): row["kl"] for row in rows if row["method"] == "rtn" and row["kl"]}
    listed = tuple(
        (
            str(row["method"]),
            str(row.get("text") or ""),
            "–" if is_original(row) else str(row["bits"]),
            number(row.get("bits_per_weight")),
            number(row["perplexity"], 4),
            number(row["kl"]),
            _times_rtn(row, rtn.get((row.get("text"), row["bits"]))),
            percent(row["top1_agreement"], 3),
            seconds(row["seconds"]),
        )
        for row in rows
    )
    columns = ("method", "text", "bits", "bits per weight", "perplexity", "KL", "KL ÷ rtn's", "top-1", "time")
    if not any(row[1] for row in listed):
        columns, listed = columns[:1] + columns[2:], tuple(row[:1] + row[2:] for row in listed)
    return Section(
        name="comparison",
        title="Methods compared",
        lead=(
            "KL is the distance from the original's predictions in nats per token, and the measure to decide by: it "
            "sees differences that perplexity hides. Bars of perplexity start at the original's. Shorter is better.",
        ),
        figures=tuple(comparison_figures(rows)),
        arrangement=PAIR,
        legend=comparison_legend(rows),
        tables=(Table("", columns, listed, text_columns=2 if columns[1] == "text" else 1),),
    )


def time_section(timings: Mapping[str, object]) -> Section:
    """Where the time went."""
    total = seconds(timings["seconds"])
    return Section("time", "Time", (f"The whole run took {total}.",), (stage_bars(timings["stages"]),))


def caution_section(report: Json) -> Section | None:
    """What may hurt a reader of the checkpoint; None where nothing may."""
    return Section("cautions", "Cautions", tuple(report["cautions"])) if report["cautions"] else None


def undone_section(report: Json) -> Section:
    """What fell back and what was kept, with reasons."""
    undone = fallbacks(report)
    kept = [keep for block in report["blocks"] for keep in block["kept"]]
    lead = (
        f"{len(undone)} choice{'s were' if len(undone) > 1 else ' was'} undone or refused, because plain "
        "rounding, or no scale, was better or safer."
        if undone
        else "Nothing fell back: every choice was at least as good as plain rounding."
    )
    tables = []
    if undone:
        rows = tuple((fallback.where, fallback.reason) for fallback in undone[:MOST_ROWS])
        tables.append(Table(_title("", undone), ("where", "why"), rows, text_columns=2))
    if kept:
        rows = tuple((keep["name"], keep["reason"]) for keep in kept[:MOST_ROWS])
        title = _title("Linears kept in full precision", kept)
        tables.append(Table(title, ("linear", "why"), rows, text_columns=2, folded=len(kept) > 20))
    return Section("undone", "What fell back, and why", (lead,), tables=tuple(tables))


def _times_rtn(row: Row, rtn: float | None) -> str:
    return "–" if row["kl"] is None or rtn is None else number(row["kl"] / rtn)


def _title(text: str, found: Sequence[object]) -> str:
    if len(found) <= MOST_ROWS:
        return text
    return f"{text} (the first {MOST_ROWS} of {len(found)}; all of them are in awqkit.json)".strip()
