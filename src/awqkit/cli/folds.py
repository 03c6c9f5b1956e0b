"""`awqkit folds MODEL`: what discovery finds in each kind of block, as tables."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from awqkit.cli.arguments import Parser, add_run_options, check_device, run_options, write_json
from awqkit.cli.console import Console, table
from awqkit.imports import importing

if TYPE_CHECKING:
    from awqkit.api.folds import FoundFold, FoundFolds, FoundKind

SUMMARY = "show where a model's channels can be scaled, and the proof"

_DESCRIPTION = """\
Shows what awqkit finds when it asks a model: the linears of each kind of block,
and every place where a channel scale can be absorbed without changing what the
model computes, with the error of its proof. Nothing is quantized or written.

MODEL  a folder with config.json and safetensors, or an id on the hub
"""

_EPILOG = """\
examples:
  awqkit folds ./Qwen3-8B
      from the weights
  awqkit folds Qwen/Qwen3-8B --random
      from the config alone: no weights are fetched or read
  awqkit folds ./Qwen3-8B --json folds.json
      the same for a program

how to read it:
  fold: producer -> consumers. The producer, a norm or rows of a linear, is
  divided by s, and the columns of its consumers are multiplied by it. error is
  the largest change of the block's output under random powers of two, relative
  to what the block adds: an exact fold has none, and up to 1e-5 is used.
"""


def build_parser() -> Parser:
    """The parser of `awqkit folds`."""
    parser = Parser("awqkit folds", usage="awqkit folds MODEL [options]", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("model", metavar="MODEL", help=argparse.SUPPRESS)
    group = parser.add_argument_group("what is looked at")
    group.add_argument(
        "--random", action="store_true", help="make weights up from config.json (default: read the model's)"
    )
    add_run_options(parser.add_argument_group("the run"), json_content="what was found")
    return parser


def run(args: argparse.Namespace, console: Console) -> None:
    """Look as `args` say and print. Raises AwqkitError."""
    options = run_options(args)
    check_device(args.device)
    with importing():
        from awqkit.api.folds import folds

    with console.listening() as emit:
        found = folds(args.model, random_weights=args.random, options=options, emit=emit)
    write_json(args.json, found.to_json())
    console.result("\n\n".join([_summary(found), *(_kind(kind) for kind in found.kinds)]))


def _summary(found: FoundFolds) -> str:
    kinds = len(found.kinds)
    weights = "weights made up from the config" if found.random_weights else "its own weights"
    return f"{found.model}: {found.num_blocks} blocks of {kinds} kind{'s' if kinds > 1 else ''}, {weights}"


def _kind(kind: FoundKind) -> str:
    lines = [f"{kind.path}, as block{'s' if len(kind.blocks) > 1 else ''} {_ranges(kind.blocks)}:"]
    linears = Counter((_numberless(name), shape) for name, shape in kind.linears.items())
    rows = [(_times(name, count), *map(str, shape)) for (name, shape), count in linears.items()]
    lines.append(table(("linear", "out", "in"), rows))
    if kind.folds:
        columns = ("fold", "kind", "channels", "error", "used")
        alike: dict[tuple[object, ...], list[FoundFold]] = {}
        for fold in kind.folds:
            alike.setdefault((_arrow(fold), fold.kind, fold.channels, fold.exact), []).append(fold)
        lines.append(table(columns, [
            (_times(name, len(folds)), sort, str(channels), f"{max(fold.proof_error for fold in folds):.1e}",
             "yes" if exact else "no")
            for (name, sort, channels, exact), folds in alike.items()
        ]))  # fmt: skip
    else:
        lines.append("No fold: nothing is scaled here; clip, rounding and refinement work all the same.")
    lines += [f"refused: {label}: {reason}" for label, reason in kind.refused]
    if kind.unwatched:
        lines.append(f"not called exactly once as a linear, stay as they are: {', '.join(kind.unwatched)}")
    return "\n".join(lines)


def _arrow(fold: FoundFold) -> str:
    consumers = Counter(_numberless(name) for name in fold.consumers)
    return f"{_numberless(fold.producer)} -> {', '.join(_times(name, count) for name, count in consumers.items())}"


def _numberless(name: str) -> str:
    """A name without the numbers that experts differ by: `mlp.experts.*.up_proj`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _times(name: str, count: int) -> str:
    return f"{name} ({count})" if count > 1 else name


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as `0-2, 5`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in parts)
