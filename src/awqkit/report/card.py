"""The model card of a quantized checkpoint: README.md with its settings and measured errors."""

from __future__ import annotations

import textwrap

from awqkit.report.report import Report


def model_card(report: Report, source_card: str | None) -> str:
    """Markdown with a metadata header. source_card: the source's README, whose license line is kept, or None."""
    recipe = report.recipe
    header = ["---", *_license_lines(source_card), f"base_model: {report.model}", "tags:", "- awq", "- awqkit", "---"]
    settings = {
        "format": "AWQ (`gemm`)",
        "method": recipe.name,
        "bits, group size": f"{recipe.bits}, {report.group_size}, {'symmetric' if recipe.symmetric else 'asymmetric'}",
        "channel scale": recipe.channel_scale
        if recipe.channel_scale == "none"
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
        *_USE.splitlines(),
        "",
    ]
    return "\n".join(parts)


_USE = textwrap.dedent("""\
    ## Use

    vLLM and SGLang read this folder as it is (`vllm serve DIR`). transformers reads it with `gptqmodel` installed.
    `awqkit.load(DIR)` gives a transformers model that needs neither. Every decision, with its errors, is in
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
