"""Figures of a comparison: perplexity and KL by method, one pair for each text and bit width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from awqkit.report.figures import CHOSEN, PLAIN, Figure, LegendEntry, horizontal_bars, number

PRESETS = ("fast", "balanced", "best")  # colored apart from the textbook methods
_NO_TEXT = ""

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Contest:
    """The rows that may be compared: one text, one bit width. original: the unquantized model's perplexity, or None."""

    text: str
    bits: int
    rows: tuple[Row, ...]
    original: float | None

    @property
    def label(self) -> str:
        """What the rows have in common, for people."""
        return f"{self.bits} bits" + (f", {self.text}" if self.text else "")


def is_original(row: Row) -> bool:
    """Whether a row is the unquantized model: it has no distance from itself."""
    return row["kl"] is None


def contests(rows: Sequence[Row]) -> list[Contest]:
    """Rows by text and bits, in the order in which they come."""
    texts = list(dict.fromkeys(row.get("text") or _NO_TEXT for row in rows))
    found = []
    for text in texts:
        here = [row for row in rows if (row.get("text") or _NO_TEXT) == text]
        original = next((row["perplexity"] for row in here if is_original(row)), None)
        quantized = [row for row in here if not is_original(row)]
        for bits in dict.fromkeys(row["bits"] for row in quantized):
            found.append(Contest(text, bits, tuple(row for row in quantized if row["bits"] == bits), original))
    return found


def comparison_figures(rows: Sequence[Row]) -> list[Figure]:
    """Two figures for each contest: perplexity, and KL."""
    found = []
    for index, contest in enumerate(contests(rows)):
        found += [_perplexity_bars(contest, index), _kl_bars(contest, index)]
    return found


def comparison_legend(rows: Sequence[Row]) -> tuple[LegendEntry, ...]:
    """What the two colors mean, where both appear."""
    methods = {row["method"] in PRESETS for row in rows if not is_original(row)}
    if methods != {True, False}:
        return ()
    return (LegendEntry("awqkit's presets", CHOSEN), LegendEntry("textbook methods", PLAIN))


def _perplexity_bars(contest: Contest, index: int) -> Figure:
    start = contest.original or 0.0
    values = [row["perplexity"] - start for row in contest.rows]
    labels = [number(row["perplexity"], 4) for row in contest.rows]
    title = f"Perplexity, {contest.label}"
    what = "perplexity" if contest.original is None else f"above the original's {number(start, 4)}"
    return _bars(f"perplexity-{index}", title, contest, values, labels, what)


def _kl_bars(contest: Contest, index: int) -> Figure:
    values = [row["kl"] for row in contest.rows]
    labels = [number(value) for value in values]
    return _bars(f"kl-{index}", f"KL, {contest.label}", contest, values, labels, "nats per token")


def _bars(name: str, title: str, contest: Contest, values: list[float], labels: list[str], what: str) -> Figure:
    methods = [str(row["method"]) for row in contest.rows]
    colors = [CHOSEN if method in PRESETS else PLAIN for method in methods]
    return horizontal_bars(name, title, methods, values, labels, colors, what)
