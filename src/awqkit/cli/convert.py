"""`awqkit convert DIR OUT --format FORMAT`: a quantized checkpoint in another format, without loss."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from awqkit.cli.arguments import Parser, one_of
from awqkit.cli.console import Console, size_text
from awqkit.imports import importing
from awqkit.options import RunOptions
from awqkit.recipe import FORMAT_NAMES

SUMMARY = "write a quantized checkpoint in another format"

_DESCRIPTION = """\
Writes a quantized checkpoint in another format. Codes, zero points and scales
stay the same numbers, all other tensors and files are copied, and what the
other format cannot hold is refused before anything is written: AWQ holds 4 bits
in groups of 128, 64, 32 or 16, compressed-tensors that and more.

DIR  a checkpoint folder, or a hub id, in the AWQ or compressed-tensors format
OUT  the folder to write; it appears only when it is complete
"""

_EPILOG = """\
examples:
  awqkit convert ./Qwen3-8B-AWQ ./Qwen3-8B-CT --format compressed-tensors
      for readers that take compressed-tensors only
  awqkit convert ./Qwen3-8B-CT ./Qwen3-8B-AWQ --format awq
      and back: the very same tensors
"""


def build_parser() -> Parser:
    """The parser of `awqkit convert`."""
    parser = Parser(
        "awqkit convert",
        usage="awqkit convert DIR OUT --format FORMAT [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument("model", metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument("out", type=Path, metavar="OUT", help=argparse.SUPPRESS)
    group = parser.add_argument_group("the checkpoint")
    group.add_argument(
        "--format",
        required=True,
        type=one_of(*FORMAT_NAMES),
        metavar="FORMAT",
        help=f"{' or '.join(FORMAT_NAMES)} (required)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace OUT if it exists (default: refuse)")
    group = parser.add_argument_group("the run")
    group.add_argument("--trust-remote-code", action="store_true", help="run modelling code that comes with the model")
    group.add_argument("--quiet", action="store_true", help="print results only: no progress, no notices")
    return parser


def run(args: argparse.Namespace, console: Console) -> None:
    """Convert as `args` say and print where the result is. Raises AwqkitError."""
    options = RunOptions(overwrite=args.overwrite, trust_remote_code=args.trust_remote_code)
    with console.listening() as emit:
        with importing():
            from awqkit.api.convert import convert

        result = convert(args.model, args.out, args.format, options=options, emit=emit)
    size = size_text(sum(path.stat().st_size for path in result.directory.rglob("*") if path.is_file()))
    console.result(
        f"Saved {result.directory} ({size}) after {result.seconds:.1f} s: {result.num_linears} linears, "
        f"{result.source} to {result.target}, without loss."
    )
    console.hint(f"\nNext:\n  vllm serve {shlex.quote(str(result.directory))}")
