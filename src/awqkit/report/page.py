"""Sections as one HTML page that needs nothing from outside: style, script, plotly.js and data are inside it.

Every text is escaped here, where it becomes HTML, and nowhere else. A content security policy forbids loading
anything, so a page that somebody passes on can neither call home nor run what a model's name smuggles in.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from awqkit.report.figures import Figure, LegendEntry
from awqkit.report.sections import Section, Table

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


@dataclass(frozen=True, slots=True)
class Fact:
    """A figure worth a place at the top: what it is, its value, and a remark or an empty text."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Heading:
    """The top of the page."""

    kicker: str
    title: str
    subtitle: str
    facts: tuple[Fact, ...]


def page(heading: Heading, sections: Sequence[Section], settings: Sequence[tuple[str, str]], closing: str) -> str:
    """The whole page. settings: pairs for the list at its end."""
    figures = [figure.to_json() for section in sections for figure in section.figures]
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(f'{heading.kicker}: {heading.title}')}</title>",
        f"<style>{_asset('page.css')}</style>",
        "</head>",
        "<body>",
        _header(heading),
        "<noscript><p>The figures are drawn by a script in this page, which your browser does not run.</p></noscript>",
        *(_section(section) for section in sections),
        _settings(settings),
        f"<footer>{_text(closing)}</footer>",
        f'<script type="application/json" id="figures">{_script_json(figures)}</script>',
        f"<script>{_plotly()}</script>",
        f"<script>{_asset('page.js')}</script>",
        "</body>",
        "</html>",
        "",
    ]
    return "\n".join(part for part in parts if part)


def _header(heading: Heading) -> str:
    facts = "".join(
        f"<div><dt>{_text(fact.label)}</dt><dd>{_text(fact.value)}"
        + (f"<small>{_text(fact.note)}</small>" if fact.note else "")
        + "</dd></div>"
        for fact in heading.facts
    )
    return (
        f'<header><p class="kicker">{_text(heading.kicker)}</p><h1>{_text(heading.title)}</h1>'
        f'<p class="subtitle">{_text(heading.subtitle)}</p>'
        + (f'<dl class="facts">{facts}</dl>' if facts else "")
        + "</header>"
    )


def _section(section: Section) -> str:
    parts = [
        f'<section id="{_text(section.name)}">',
        f"<h2>{_text(section.title)}</h2>",
        *(f"<p>{_text(paragraph)}</p>" for paragraph in section.lead if paragraph),
        _legend(section.legend),
        _ramp(section.ramp),
        _figures(section),
        *(_table(table) for table in section.tables),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _legend(entries: Sequence[LegendEntry]) -> str:
    items = "".join(
        f'<li><span class="mark{" outlined" if entry.outlined else ""}" '
        f'style="--mark: var(--{entry.color.removeprefix("@")})"></span>{_text(entry.label)}</li>'
        for entry in entries
    )
    return f'<ul class="legend">{items}</ul>' if items else ""


def _ramp(labels: Sequence[str]) -> str:
    if not labels:
        return ""
    marks = "".join(
        f'<span style="left: {100 * place / (len(labels) - 1):g}%">{_text(label)}</span>'
        for place, label in enumerate(labels)
    )
    return f'<div class="ramp"><i></i><div>{marks}</div></div>'


def _figures(section: Section) -> str:
    drawn = "\n".join(_figure(figure, section.title) for figure in section.figures)
    return f'<div class="figures {section.arrangement}">\n{drawn}\n</div>' if drawn else ""


def _figure(figure: Figure, section: str) -> str:
    caption = f"<figcaption>{_text(figure.title)}</figcaption>" if figure.title else ""
    label = f"{section}: {figure.title}" if figure.title else section
    return (
        f'<figure>{caption}<div class="plot" id="plot-{_text(figure.name)}" role="img" aria-label="{_text(label)}" '
        f'style="height: {figure.height_px}px"></div>{_legend(figure.legend)}</figure>'
    )


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        left = f'<{tag} class="left">'
        return "".join(
            f"{left}{_name(cell)}</{tag}>" if column < table.text_columns else f"<{tag}>{_text(cell)}</{tag}>"
            for column, cell in enumerate(cells)
        )

    body = "\n".join(f"<tr>{row(cells, 'td')}</tr>" for cells in table.rows)
    drawn = (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{row(table.columns, "th")}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )
    if table.folded:
        return f'<details class="table"><summary>{_text(table.title)}</summary>{drawn}</details>'
    title = f"<p>{_text(table.title)}</p>" if table.title else ""
    return f'<div class="table">{title}{drawn}</div>'


def _settings(settings: Sequence[tuple[str, str]]) -> str:
    pairs = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in settings)
    if not pairs:
        return ""
    return f'<section id="settings"><h2>How it was made</h2><dl class="settings">{pairs}</dl></section>'


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _name(text: str) -> str:
    """`text`, which may be a long name: a narrow column may break it where its parts meet."""
    return re.sub(r"([._])", r"\1<wbr>", _text(text))


def _script_json(value: object) -> str:
    """JSON that may stand inside a script element: no `<` in it can end the element or begin a comment."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return (files("awqkit.report") / name).read_text(encoding="utf-8").strip()


def _plotly() -> str:
    # Imported here: only a page needs it. The wheel ships one bundle, the full one.
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()
