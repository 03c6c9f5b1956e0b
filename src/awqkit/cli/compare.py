"""`awqkit compare MODEL --text FILE`: several methods on one model, as a table, as JSON and as a page."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from awqkit.api.contenders import DEFAULT_BITS, METHODS
from awqkit.cli.arguments import Parser, add_run_options, check_device, one_of, run_options, whole_number, write_json
from awqkit.cli.console import Console, table
from awqkit.imports import importing
from awqkit.recipe import DEFAULT_GROUP_SIZES, PER_CHANNEL, Recipe

if TYPE_CHECKING:
    from awqkit.api.compare import Comparison, ComparisonRow

SUMMARY = "compare methods on a model and a text, before quantizing it"

_DEFAULT_WINDOWS = 32
_YARDSTICK = "rtn"
_LEGEND_WIDTH = 80

_DESCRIPTION = """\
Quantizes a model in memory by several methods and measures each on a text,
against the original; no checkpoint is written. The model is read block by
block, so that one that does not fit into memory can be compared, too, and what
the calibration text shows of the original is gathered once for all methods.

MODEL  a folder with safetensors (bf16, fp16 or fp32), or a hub id (org/name)

methods:
  fp           the original
  rtn          round to nearest
  gptq         GPTQ as published, act-order
  smoothquant  SmoothQuant: 8-bit weights and activations, whatever --bits says
  awq          AWQ as published, without clipping; awq-clip: with it
  fast, balanced, best
               awqkit's presets, as in  awqkit quantize --quality
"""

_EPILOG = """\
examples:
  awqkit compare ./Qwen3-8B --text held_out.txt
      every method at 4 bits; best takes longest
  awqkit compare ./Qwen3-8B --text held_out.txt --methods fp,rtn,awq,balanced
      some methods
  awqkit compare ./Qwen3-8B --text near.txt --text far.txt --bits 4,3
      two texts, two bit widths
  awqkit compare ./Qwen3-8B --text held_out.txt --report compared.html
      the table with figures, for any browser
"""

_LEGEND = """\
perplexity: lower is better. KL: distance from the original in nats per token,
the figure to decide by; / rtn: as a share of plain rounding's. top-1: how often
both put the same token first. bits/w: of a weight on disk, all included."""


def build_parser() -> Parser:
    """The parser of `awqkit compare`."""
    parser = Parser(
        "awqkit compare",
        usage="awqkit compare MODEL --text FILE [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", help=argparse.SUPPRESS)
    group = parser.add_argument_group("the comparison")
    group.add_argument(
        "--text", action="append", required=True, metavar="FILE",
        help="a .txt or .jsonl file to measure on; may be given several times (required)",
    )  # fmt: skip
    group.add_argument(
        "--methods", type=_list_of(one_of(*METHODS)), default=METHODS, metavar="LIST",
        help="of the methods above, with commas between (default: all)",
    )  # fmt: skip
    default_bits = ",".join(map(str, DEFAULT_BITS))
    group.add_argument(
        "--bits", type=_list_of(_bits), default=DEFAULT_BITS, metavar="LIST",
        help=f"bits per weight: 2, 3, 4 and 8, with commas between (default: {default_bits})",
    )  # fmt: skip
    first, *smaller = DEFAULT_GROUP_SIZES
    group.add_argument(
        "--group-size", type=_group_size, metavar="N",
        help=f"input channels that share a scale, or channel: one scale a row (default: {first}, or the larger of "
        f"{' and '.join(map(str, smaller))} that divides every input where {first} does not)",
    )  # fmt: skip
    group.add_argument(
        "--windows", type=_windows, default=_DEFAULT_WINDOWS, metavar="N",
        help=f"windows of --seq-len tokens to measure on, of each text, or all (default: {_DEFAULT_WINDOWS})",
    )  # fmt: skip
    _add_calibration_options(parser)
    group = parser.add_argument_group("the run")
    group.add_argument(
        "--report", type=Path, metavar="FILE.html", help="also write a page with the table and figures, for any browser"
    )
    add_run_options(group, json_content="the table's rows")
    return parser


def _add_calibration_options(parser: Parser) -> None:
    default = Recipe()
    group = parser.add_argument_group("the calibration text")
    group.add_argument(
        "--calibration", default=default.calibration, metavar="TEXT",
        help=f"a .txt or .jsonl file, a hub dataset, or builtin: text found on any machine "
        f"(default: {default.calibration})",
    )  # fmt: skip
    for flag, low, value, meaning in (
        ("--samples", 1, default.samples, "rows of text"),
        ("--seq-len", 8, default.seq_len, "tokens per row, and per window"),
        ("--seed", 0, default.seed, "of the choice of rows"),
    ):
        group.add_argument(
            flag, type=whole_number(low), default=value, metavar="N", help=f"{meaning} (default: {value})"
        )


def run(args: argparse.Namespace, console: Console) -> None:
    """Compare as `args` say and print the table. Raises AwqkitError."""
    options = run_options(args)
    with console.listening() as emit:
        check_device(args.device)
        with importing():
            from awqkit.api.compare import compare
            from awqkit.api.report_page import check_report_path, write_report

        if args.report is not None:
            check_report_path(args.report)
        found = compare(
            args.model,
            args.text,
            methods=args.methods,
            bits=args.bits,
            group_size=args.group_size,
            calibration=args.calibration,
            samples=args.samples,
            seq_len=args.seq_len,
            seed=args.seed,
            windows=args.windows,
            options=options,
            emit=emit,
        )
    console.result("\n\n".join(_table_text(found, text) for text in found.windows))
    console.hint(f"\n{_LEGEND}\n{_seconds_text(found)}")
    saved = found.to_json()
    write_json(args.json, saved)
    if args.report is not None:
        write_report(args.report, None, None, saved["rows"])
        console.hint(f"\nWrote the report to {args.report}.")


def _table_text(found: Comparison, text: str) -> str:
    rows = [row for row in found.rows if row.text == text]
    plain = {row.bits: row.kl for row in rows if row.method == _YARDSTICK}
    columns = ("method", "bits", "bits/w", "perplexity", "KL", "/ rtn", "top-1", "seconds")
    heading = f"{text}: {found.windows[text]} windows of {found.tokens_per_window} tokens"
    return f"{heading}\n{table(columns, [_cells(row, plain.get(row.bits)) for row in rows])}"


def _cells(row: ComparisonRow, plain: float | None) -> tuple[str, ...]:
    share = row.kl / plain if row.kl is not None and plain else None
    return (
        row.method,
        str(row.bits),
        f"{row.bits_per_weight:.2f}",
        f"{row.perplexity:.3f}",
        _number(row.kl, "{:.5f}"),
        _number(share, "{:.3f}"),
        _number(row.top1_agreement, "{:.1%}"),
        _number(row.seconds, "{:.1f}"),
    )


def _seconds_text(found: Comparison) -> str:
    shared = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in found.shared_seconds.items())
    text = f"seconds: what this method alone took. Shared by several: {shared}. In all: {found.seconds:.1f}."
    return textwrap.fill(text, _LEGEND_WIDTH)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _list_of(parse: Callable[[str], Any]) -> Callable[[str], Sequence[Any]]:
    """A `type=` for a list with commas between, each of which `parse` takes; what comes twice counts once."""
    return lambda text: tuple(dict.fromkeys(parse(word.strip()) for word in text.split(",")))


def _bits(text: str) -> int:
    if text not in ("2", "3", "4", "8"):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of 2, 3, 4, 8")
    return int(text)


def _group_size(text: str) -> int:
    return PER_CHANNEL if text == "channel" else whole_number(1)(text)


def _windows(text: str) -> int | None:
    return None if text == "all" else whole_number(1)(text)
