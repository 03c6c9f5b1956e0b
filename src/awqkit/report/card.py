"""The model card of a quantized checkpoint: README.md with its settings and measured errors."""

from __future__ import annotations

import textwrap

from awqkit.formats.format import FORMATS
from awqkit.formats.scheme import Scheme
from awqkit.recipe import PER_CHANNEL
from awqkit.report.report import Report


def model_card(report: Report, source_card: str | None, *, is_plain: bool = False) -> str:
    """Markdown with a metadata header. source_card: the source's README, whose license line is kept, or None.

    is_plain: whether the source was a module in memory, of which only the weights are in the folder.
    """
    recipe = report.recipe
    written, scheme = FORMATS[recipe.format], Scheme.of(recipe, report.group_size)
    tags = ["tags:", f"- {written.name}", "- awqkit"]
    base = [] if is_plain else [f"base_model: {report.model}"]
    header = ["---", *_license_lines(source_card), *base, *tags, "---"]
    groups = "one a row" if report.group_size == PER_CHANNEL else report.group_size
    settings = {
        "format": written.title(scheme),
        "method": recipe.name,
        "bits, group size": f"{recipe.bits}, {groups}, {'symmetric' if recipe.symmetric else 'asymmetric'}",
        "channel scale": "none"
        if not recipe.scales_channels
        else f"{' + '.join(recipe.scale_families)}, importance {recipe.importance}, alpha per {recipe.alpha_search}",
        "clip": recipe.clip,
        "bits per quantized weight": f"{report.bits_per_weight:.3f}",
        "dtype of the rest": report.stored_dtype,
        "calibration": _calibration_text(report),
        "seed": str(recipe.seed),
        "versions": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
    }
    rows = [f"| {name} | {value} |" for name, value in settings.items()]
    cautions = [f"- {text}" for text in report.cautions]
    parts = [
        *header,
        "",
        f"# {report.model}, quantized with awqkit",
        "",
        "| setting | value |",
        "| --- | --- |",
        *rows,
        "",
        "## Measured while quantizing",
        "",
        "```text",
        str(report),
        "```",
        "",
        *(["## Cautions", "", *cautions, ""] if cautions else []),
        "## Use",
        "",
        *textwrap.wrap(_PLAIN if is_plain else written.readers(scheme), _WIDTH, break_long_words=False),
        *(_DECISIONS if is_plain else _USE).splitlines(),
        "",
    ]
    return "\n".join(parts)


_WIDTH = 118
_DECISIONS = "Every decision, with its errors, is in `awqkit.json`."
_PLAIN = (
    "No server or library loads this folder by itself: it holds the weights of a plain PyTorch module, not its code. "
    "`awqkit.load(DIR, into=MODULE)` fills a module of the class that was quantized; its linears then compute with the "
    "packed weights."
)
_USE = textwrap.dedent("""\
    `awqkit.load(DIR)` gives a transformers model that needs no other package. Every decision, with its errors, is in
    `awqkit.json`.""")


def _calibration_text(report: Report) -> str:
    used = report.calibration
    if used is None:
        return "none needed"
    return f"{used.source}: {used.rows} rows of {used.tokens_per_row} tokens, {used.held_out_rows} held out"


def _license_lines(source_card: str | None) -> list[str]:
    if source_card is None or not source_card.startswith("---"):
        return []
    header = source_card.split("---", 2)[1]
    return [line for line in header.splitlines() if line.startswith(("license:", "license_name:", "license_link:"))]
