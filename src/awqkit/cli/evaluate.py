"""`awqkit evaluate MODEL --text FILE`: perplexity, and with a reference KL and top-1 agreement."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from awqkit.cli.arguments import (
    Parser,
    add_run_options,
    check_device,
    dtype_of,
    run_options,
    whole_number,
    write_json,
)
from awqkit.cli.console import Console
from awqkit.imports import importing

if TYPE_CHECKING:
    from awqkit.api.evaluate import Evaluation

SUMMARY = "measure a model on a text, also against a reference"

_DEFAULT_SEQ_LEN = 512
_DTYPES = ("float32", "bfloat16", "float16")

_DESCRIPTION = """\
Measures a model, quantized or not, on a text that it was not calibrated on:
perplexity over windows that do not overlap, as in the GPTQ and AWQ papers. With
--reference also how far it is from the original: KL(reference || model) in nats
per token, and how often both put the same token first. KL sees differences that
perplexity hides.

MODEL  a checkpoint folder (full precision or quantized), or a hub id
"""

_EPILOG = """\
examples:
  awqkit evaluate ./Qwen3-8B-AWQ --text held_out.txt
      perplexity alone
  awqkit evaluate ./Qwen3-8B-AWQ --text held_out.txt --reference ./Qwen3-8B
      against the original
  awqkit evaluate ./Qwen3-8B-AWQ --text held_out.txt --max-windows 16
      a first impression in a short time
"""


def build_parser() -> Parser:
    """The parser of `awqkit evaluate`."""
    parser = Parser(
        "awqkit evaluate",
        usage="awqkit evaluate MODEL --text FILE [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", help=argparse.SUPPRESS)
    group = parser.add_argument_group("the measurement")
    group.add_argument("--text", required=True, metavar="FILE", help="a .txt or .jsonl file to measure on (required)")
    group.add_argument("--reference", metavar="MODEL", help="the original model, for KL and top-1 agreement")
    group.add_argument(
        "--seq-len", type=whole_number(2), default=_DEFAULT_SEQ_LEN, metavar="N",
        help=f"tokens per window (default: {_DEFAULT_SEQ_LEN})",
    )  # fmt: skip
    group.add_argument(
        "--max-windows",
        type=whole_number(1),
        metavar="N",
        help="stop after N windows (default: the whole text)",
    )
    group.add_argument(
        "--dtype", type=dtype_of(*_DTYPES), default=_DTYPES[0], metavar="DTYPE",
        help=f"to compute in: {', '.join(_DTYPES)} (default: {_DTYPES[0]})",
    )  # fmt: skip
    add_run_options(parser.add_argument_group("the run"), json_content="the scores")
    return parser


def run(args: argparse.Namespace, console: Console) -> None:
    """Evaluate as `args` say and print the scores. Raises AwqkitError."""
    options = run_options(args)
    with console.listening() as emit:
        check_device(args.device)
        with importing():
            from awqkit.api.evaluate import evaluate

        scores = evaluate(
            args.model,
            args.text,
            reference=args.reference,
            seq_len=args.seq_len,
            max_windows=args.max_windows,
            dtype=args.dtype,
            options=options,
            emit=emit,
        )
    console.result(_scores_text(scores))
    write_json(args.json, scores.to_json())


def _scores_text(scores: Evaluation) -> str:
    lines = [f"perplexity       {scores.perplexity:.4f}"]
    if scores.kl is not None:
        lines.append(f"KL divergence    {scores.kl:.5f} nats per token, KL(reference || model)")
    if scores.top1_agreement is not None:
        lines.append(f"top-1 agreement  {100 * scores.top1_agreement:.2f} %")
    lines.append(f"measured on      {scores.tokens} tokens in {scores.windows} windows")
    return "\n".join(lines)
