"""`awqkit quantize MODEL OUT`: flags and a recipe file become a Recipe; the rest is `awqkit.api.quantize`."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from awqkit.cli.arguments import (
    Parser,
    add_run_options,
    check_device,
    dtype_of,
    one_of,
    run_options,
    whole_number,
    write_json,
)
from awqkit.cli.console import Console, size_text
from awqkit.events import BlockFinished, Event, Notice
from awqkit.recipe import (
    DEFAULT_GROUP_SIZES,
    DEFAULT_QUALITY,
    FORMAT_NAMES,
    PER_CHANNEL,
    STORED_DTYPES,
    Recipe,
    read_recipe_file,
)

if TYPE_CHECKING:
    from awqkit.api.quantize import QuantizeResult

SUMMARY = "quantize a model to an AWQ checkpoint: the main job"

QUALITIES = ("fast",)
METHODS = ("rtn", "awq")
IMPORTANCES = ("square", "mean-abs")
ALPHA_SEARCHES = ("group", "layer")
# Flags whose destination is the Recipe field (or preset choice) of the same name; None means "not given".
RECIPE_FLAGS = (
    "quality", "method", "format", "bits", "group_size", "symmetric", "dtype", "ignore", "alpha_search", "importance",
    "clip", "calibration", "samples", "seq_len", "seed",
)  # fmt: skip

_DESCRIPTION = """\
Quantizes the linear layers of a language model to 4 bits and writes an AWQ
checkpoint that vLLM, SGLang and transformers load as it is. It goes block by
block: channel scales and clipping are searched on calibration text, and what is
not better than plain rounding is undone.

MODEL  a folder with safetensors (bf16, fp16 or fp32), or a hub id (org/name)
OUT    the folder to write; it appears only when it is complete
"""

_EPILOG = """\
examples:
  awqkit quantize ./Qwen3-8B ./Qwen3-8B-AWQ
      the main job, with text found on this machine for calibration
  awqkit quantize ./Qwen3-8B ./Qwen3-8B-AWQ --calibration mine.jsonl
      calibrate on text like what the model will read: usually better
  awqkit quantize ./Qwen3-8B out --group-size 64 --ignore '*.down_proj'
      smaller groups, and some linears kept as they are
  awqkit quantize ./Qwen3-8B out --method rtn
      plain rounding, to see what the search is worth; reads no text
  awqkit quantize ./Qwen3-8B out --recipe mine.toml --seed 1
      all settings from a file, except for those given as flags

then:
  vllm serve ./Qwen3-8B-AWQ
  awqkit evaluate ./Qwen3-8B-AWQ --text t.txt --reference ./Qwen3-8B

a recipe file holds the same names, with underscores:
  method = "awq"
  group_size = 64
  ignore = ["*.down_proj"]
"""


def build_parser() -> Parser:
    """The parser of `awqkit quantize`."""
    parser = Parser(
        "awqkit quantize",
        usage="awqkit quantize MODEL OUT [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("out", type=Path, metavar="OUT", help=argparse.SUPPRESS)
    _add_checkpoint_options(parser)
    _add_method_options(parser)
    _add_calibration_options(parser)
    group = parser.add_argument_group("the run")
    group.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    group.add_argument(
        "--recipe",
        type=Path,
        metavar="FILE.toml",
        help="read settings from FILE.toml; flags given here win over it",
    )
    group.add_argument(
        "--report", type=Path, metavar="FILE.html", help="also write the report as a page with figures, for any browser"
    )
    add_run_options(group, json_content="the report")
    return parser


def run(args: argparse.Namespace, console: Console) -> None:
    """Quantize as `args` say and print the report. Raises AwqkitError."""
    recipe = recipe_from(args)
    options = run_options(args, overwrite=args.overwrite)
    num_fallbacks = 0

    def count(event: Event) -> None:
        nonlocal num_fallbacks
        if isinstance(event, BlockFinished):
            num_fallbacks += event.num_fallbacks
        emit(event)

    with console.listening() as emit:
        for text in unused_flags(args, recipe):
            emit(Notice(text))
        check_device(args.device)
        from awqkit.api.quantize import quantize

        result = quantize(
            args.model, args.out, recipe, options=options, report_page=args.report, emit=count
        )
    console.result(str(result.report))
    console.result(f"\n{_closing_line(result, num_fallbacks)}")
    if args.report is not None:
        console.result(f"Wrote the report to {args.report}.")
    write_json(args.json, result.report.to_json())
    console.hint(_next_steps(args.model, result.directory))


def recipe_from(args: argparse.Namespace) -> Recipe:
    """The Recipe of a command line: the recipe file's keys, then the flags, key by key. Raises UsageError.

    `quality` and `method` exclude each other, so either one given as a flag drops both of the file's.
    """
    choices = {} if args.recipe is None else dict(read_recipe_file(args.recipe))
    flags: dict[str, Any] = {key: getattr(args, key) for key in RECIPE_FLAGS if getattr(args, key) is not None}
    if "quality" in flags or "method" in flags:
        choices.pop("quality", None)
        choices.pop("method", None)
    return Recipe.from_choices({**choices, **flags})


def unused_flags(args: argparse.Namespace, recipe: Recipe) -> list[str]:
    """One sentence for each kind of flag that this recipe does not look at."""
    sentences = []
    search = [f"--{key.replace('_', '-')}" for key in ("alpha_search", "importance") if getattr(args, key) is not None]
    if search and recipe.channel_scale == "none":
        sentences.append(f"{' and '.join(search)} not used: {recipe.name} searches no channel scales")
    if args.calibration is not None and not recipe.needs_calibration:
        sentences.append(f"--calibration not used: {recipe.name} looks at no text")
    return sentences


def _add_checkpoint_options(parser: Parser) -> None:
    default = Recipe()
    group = parser.add_argument_group("the checkpoint")
    group.add_argument(
        "--format", type=one_of(*FORMAT_NAMES), metavar="FORMAT",
        help=f"{' or '.join(FORMAT_NAMES)}, which also holds 2, 3 and 8 bits and one group a row "
        f"(default: {default.format})",
    )  # fmt: skip
    group.add_argument("--bits", type=whole_number(1), metavar="N", help=f"bits per weight (default: {default.bits})")
    first, *smaller = DEFAULT_GROUP_SIZES
    group.add_argument(
        "--group-size", type=_group_size, metavar="N",
        help=f"input channels that share a scale, or channel: one scale a row (default: {first}, or the larger of "
        f"{' and '.join(map(str, smaller))} that divides every input where {first} does not)",
    )  # fmt: skip
    grid = group.add_mutually_exclusive_group()
    grid.add_argument(
        "--symmetric",
        dest="symmetric",
        action="store_const",
        const=True,
        help="zero point fixed in the middle",
    )
    grid.add_argument(
        "--asymmetric", dest="symmetric", action="store_const", const=False,
        help="a zero point for every group (default)",
    )  # fmt: skip
    group.add_argument(
        "--dtype", type=dtype_of(*STORED_DTYPES), metavar="DTYPE",
        help="bfloat16 or float16, for what is not packed (default: the model's; float32 becomes bfloat16)",
    )  # fmt: skip
    group.add_argument(
        "--ignore", action="append", metavar="GLOB",
        help="keep linears whose full module path matches; may be given several times; replaces a recipe "
        "file's list (lm_head is always kept)",
    )  # fmt: skip


def _add_method_options(parser: Parser) -> None:
    default = Recipe()
    group = parser.add_argument_group("the method (a preset or a textbook method, not both)")
    group.add_argument(
        "--quality", type=one_of(*QUALITIES), metavar=_braces(QUALITIES),
        help=f"preset; fast: AWQ scales of two families and clipping (default: {DEFAULT_QUALITY})",
    )  # fmt: skip
    group.add_argument(
        "--method", type=one_of(*METHODS), metavar=_braces(METHODS),
        help="rtn: round to nearest; awq: scales as in the AWQ paper, and clipping",
    )  # fmt: skip
    group.add_argument(
        "--alpha-search", type=one_of(*ALPHA_SEARCHES), metavar=_braces(ALPHA_SEARCHES),
        help=f"one alpha per group, or one per layer as in the paper (default: {default.alpha_search})",
    )  # fmt: skip
    group.add_argument(
        "--importance", type=one_of(*IMPORTANCES), metavar=_braces(IMPORTANCES),
        help=f"of a channel: E[x^2], or AutoAWQ's (E|x|)^2 (default: {default.importance})",
    )  # fmt: skip
    clip = group.add_mutually_exclusive_group()
    clip.add_argument(
        "--clip", dest="clip", action="store_const", const="ends",
        help="search how far to clip both ends of each group's range (default, except for rtn)",
    )  # fmt: skip
    clip.add_argument("--no-clip", dest="clip", action="store_const", const="none", help="keep the full range")


def _add_calibration_options(parser: Parser) -> None:
    default = Recipe()
    group = parser.add_argument_group("the calibration text")
    group.add_argument(
        "--calibration", metavar="TEXT",
        help="a .txt file (documents separated by <|endoftext|>), a .jsonl file with text or chat messages, "
        f"a hub dataset, or builtin: text found on any machine (default: {default.calibration})",
    )  # fmt: skip
    for flag, value, meaning in (
        ("--samples", default.samples, "rows of text"),
        ("--seq-len", default.seq_len, "tokens per row"),
        ("--seed", default.seed, "of the choice of rows"),
    ):
        group.add_argument(flag, type=whole_number(0), metavar="N", help=f"{meaning} (default: {value})")


def _group_size(text: str) -> int:
    return PER_CHANNEL if text == "channel" else whole_number(1)(text)


def _braces(choices: tuple[str, ...]) -> str:
    return f"{{{','.join(choices)}}}"


def _closing_line(result: QuantizeResult, num_fallbacks: int) -> str:
    size = size_text(sum(path.stat().st_size for path in result.directory.iterdir()))
    fallbacks = f"{num_fallbacks or 'no'} fallback{'' if num_fallbacks == 1 else 's'}"
    return f"Saved {result.directory} ({size}) after {result.seconds:.1f} s, with {fallbacks}."


def _next_steps(model: str, directory: Path) -> str:
    out = shlex.quote(str(directory))
    load = f"import awqkit; print(awqkit.load({json.dumps(str(directory))}))"
    return (
        "\nNext:\n"
        f"  vllm serve {out}\n"
        f"  awqkit evaluate {out} --text held_out.txt --reference {shlex.quote(model)}\n"
        f"  python -c {shlex.quote(load)}"
    )
