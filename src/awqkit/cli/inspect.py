"""`awqkit inspect DIR`: the scale analysis of a finished checkpoint as tables."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from awqkit.cli.arguments import Parser, check_json_path, write_json
from awqkit.cli.console import Console, table
from awqkit.imports import importing

if TYPE_CHECKING:
    from awqkit.api.inspect import Inspection

SUMMARY = "show what was decided for a finished checkpoint"

_SHOWN_REASONS = 20

_DESCRIPTION = """\
Shows what awqkit decided when it wrote a checkpoint: how its channel scales are
spread, which alpha the searches chose, how much of the groups' range was kept,
what fell back and why. Reads awqkit.json alone, no weights.

DIR  a folder that `awqkit quantize` wrote
"""

_EPILOG = """\
examples:
  awqkit inspect ./Qwen3-8B-AWQ
      tables
  awqkit inspect ./Qwen3-8B-AWQ --json scales.json
      the same for a program

how to read the scales:
  s multiplies columns of the weight before they are rounded. mean, std and
  max/mean are means over the blocks, min and max the extremes; the last three
  columns are shares of channels, relative to the mean of their own fold.
"""


def build_parser() -> Parser:
    """The parser of `awqkit inspect`."""
    parser = Parser("awqkit inspect", usage="awqkit inspect DIR [options]", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("directory", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    group = parser.add_argument_group("the output")
    group.add_argument(
        "--json", type=Path, metavar="PATH", help="also write all of it to PATH as JSON (default: tables alone)"
    )
    parser.set_defaults(quiet=False)  # there is nothing but results to print
    return parser


def run(args: argparse.Namespace, console: Console) -> None:
    """Inspect as `args` say and print. Raises AwqkitError."""
    check_json_path(args.json)
    with importing():
        from awqkit.api.inspect import inspect

    found = inspect(args.directory)
    write_json(args.json, found.to_json())
    console.result("\n\n".join(filter(None, _parts(found))))


def _parts(found: Inspection) -> list[str]:
    searched = found.recipe["channel_scale"] != "none" and found.recipe.get("folds", "on") == "on"
    return [
        _summary(found),
        _scales(found) if found.scales or not searched else _NO_SCALES,
        _alphas(found),
        _clips(found),
        _undone(found),
    ]


_NO_SCALES = "The awqkit that wrote this checkpoint did not keep its channel scales; quantize again to see them."


def _summary(found: Inspection) -> str:
    recipe = found.recipe
    grid = "symmetric" if recipe["symmetric"] else "asymmetric"
    groups = "one group per row" if found.group_size == -1 else f"groups of {found.group_size}"
    lines = [
        f"{found.model}: {recipe['name']}, {recipe['bits']} bits, {groups}, {grid}, format {recipe['format']}, "
        f"{found.bits_per_weight:.2f} bits per weight",
        f"{found.linears} linears in {found.blocks} blocks"
        + (f", {found.kept} more kept in full precision" if found.kept else "")
        + (f"; {found.folds_in_use} of {found.folds} folds in use" if found.folds else ""),
    ]
    if found.calibration is not None:
        used = found.calibration
        own = used.get("generated_rows", 0)
        beside = f", and {own} that the model wrote itself" if own else ""
        lines.append(f"calibration: {used['source']}, {used['rows']} rows of {used['tokens_per_row']} tokens{beside}")
    if found.mean_output_errors is not None:
        plain, chosen = found.mean_output_errors
        lines.append(f"mean output error of a linear: {plain:.5f} plainly rounded, {chosen:.5f} as written")
    return "\n".join(lines)


def _scales(found: Inspection) -> str:
    if not found.scales:
        return "No channel scales: this recipe searches none."
    columns = ("fold", "in use", "mean", "min", "max", "std", "max/mean", "> 5x", "> 2x", "< 0.5x")
    rows = [
        (
            row.fold,
            f"{row.in_use}/{row.found}",
            *(_number(value) for value in (row.mean, row.min, row.max, row.std, row.max_over_mean)),
            *(_percent(share) for share in (row.share_above_5x, row.share_above_2x, row.share_below_half)),
        )
        for row in found.scales
    ]
    return f"Channel scales s, by the fold that absorbs them:\n{table(columns, rows)}"


def _alphas(found: Inspection) -> str:
    if not found.alphas:
        return ""
    columns = ("fold", "units", "at s = 1", "won by", "alpha min", "median", "max")
    rows = [
        (
            row.fold,
            str(row.units),
            str(row.identity),
            ", ".join(f"{family} {won}" for family, won in row.families.items()) or "-",
            *(_number(value) for value in (row.min, row.median, row.max)),
        )
        for row in found.alphas
    ]
    return f"Search over alpha:\n{table(columns, rows)}"


def _clips(found: Inspection) -> str:
    if not found.clips:
        return ""
    columns = ("linear", "number", "mean", "least", "most")
    rows = [
        (row.linear, str(row.linears), *(_percent(share) for share in (row.mean, row.min, row.max)))
        for row in found.clips
    ]
    return f"Clip, the share of the groups' range that was kept:\n{table(columns, rows)}"


def _undone(found: Inspection) -> str:
    if not found.fallbacks:
        return "Nothing fell back."
    count = len(found.fallbacks)
    lines = [f"{count} choice{'s' if count > 1 else ''} fell back:"]
    lines += [f"  {fallback.where}: {fallback.reason}" for fallback in found.fallbacks[:_SHOWN_REASONS]]
    if count > _SHOWN_REASONS:
        lines.append(f"  and {count - _SHOWN_REASONS} more: see --json, or awqkit.json")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:#.3g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
