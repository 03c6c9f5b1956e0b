"""`awqkit quantize MODEL OUT`: flags and a recipe file become a Recipe; the rest is `awqkit.api.quantize`."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from awqkit.cli.arguments import (
    Parser,
    above_zero,
    add_run_options,
    check_device,
    run_options,
    whole_number,
    write_json,
)
from awqkit.cli.console import Console, size_text, table
from awqkit.cli.progress import clock_text
from awqkit.cli.recipe_flags import add_recipe_options, recipe_from, unused_flags
from awqkit.events import BlockFinished, Event, Notice
from awqkit.imports import importing
from awqkit.options import RunOptions

if TYPE_CHECKING:
    from awqkit.api.estimate import Estimate
    from awqkit.api.quantize import QuantizeResult

SUMMARY = "quantize a model to a low-bit checkpoint: the main job"

_DESCRIPTION = """\
Quantizes the linear layers of a language model, by default to 4 bits, and
writes a checkpoint that vLLM, SGLang and transformers load. It goes block
by block: channel scales, clipping and codes are searched on calibration text,
and what is not better than plain rounding is undone.

MODEL  a folder with safetensors (bf16, fp16 or fp32), or a hub id (org/name)
OUT    the folder to write; it appears only when it is complete
"""

_EPILOG = """\
examples:
  awqkit quantize ./Qwen3-8B ./Qwen3-8B-AWQ
      the main job, with text found on this machine for calibration
  awqkit quantize ./Qwen3-8B ./Qwen3-8B-AWQ --calibration mine.jsonl
      calibrate on text like what the model will read: usually better
  awqkit quantize ./Qwen3-8B out --quality best --report out.html
      the most accurate weights, and a page that shows what was decided
  awqkit quantize ./Qwen3-8B out --bits 3 --format compressed-tensors
      3 bits a weight; the AWQ format holds 4 bits only
  awqkit quantize ./Qwen3-8B out --method smoothquant
      8-bit weights and activations (W8A8), as compressed-tensors
  awqkit quantize ./Qwen3-8B out --group-size 64 --ignore '*.down_proj'
      smaller groups, and some linears kept as they are
  awqkit quantize ./Qwen3-8B out --method rtn
      plain rounding, to see what the search is worth; reads no text
  awqkit quantize ./Qwen3-8B out --recipe mine.toml --seed 1
      all settings from a file, except for those given as flags
  torchrun --nproc-per-node 4 -m awqkit quantize ./Qwen3-8B out
      four GPUs on one run

then:
  vllm serve ./Qwen3-8B-AWQ
  awqkit evaluate ./Qwen3-8B-AWQ --text t.txt --reference ./Qwen3-8B

a recipe file holds the same names with underscores (and propagation for
--propagate), and all others that  python -c 'help("awqkit.recipe.Recipe")'
explains:
  quality = "balanced"
  group_size = 64
  damp_ratio = 0.1
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
    add_recipe_options(parser)
    group = parser.add_argument_group("the run")
    group.add_argument(
        "--estimate", action="store_true",
        help="measure one block, say how long the run will take and what it needs of memory and disk; write nothing",
    )  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    group.add_argument(
        "--restart", action="store_true", help="throw away what a stopped run left, instead of going on from there"
    )
    group.add_argument(
        "--save-every", type=whole_number(0), default=RunOptions().save_every, metavar="SECONDS",
        help="how often, at least, a run is made durable, between two blocks: a run that is stopped, even killed, goes "
        "on from there with the same command (default: 60)",
    )  # fmt: skip
    group.add_argument(
        "--device-memory", type=above_zero, metavar="GB",
        help="most memory of the GPU that tensors may take, where others use it too (default: what is free)",
    )  # fmt: skip
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
    options = replace(
        run_options(args, overwrite=args.overwrite),
        restart=args.restart,
        save_every=args.save_every,
        device_memory=args.device_memory,
    )
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
        if args.estimate:
            with importing():
                from awqkit.api.estimate import estimate

            found = estimate(args.model, args.out, recipe, options=options, emit=emit)
    if args.estimate:
        console.result(_estimate_text(found))
        write_json(args.json, found.to_json())
        return
    with console.listening() as emit:
        with importing():
            from awqkit.api.quantize import quantize

        result = quantize(args.model, args.out, recipe, options=options, report_page=args.report, emit=count)
    if console.follows:
        return
    console.result(str(result.report))
    console.result(f"\n{_closing_line(result, num_fallbacks)}")
    if args.report is not None:
        console.result(f"Wrote the report to {args.report}.")
    write_json(args.json, result.report.to_json())
    console.hint(_next_steps(args.model, result.directory))


def _estimate_text(found: Estimate) -> str:
    """The table by stage, then what is needed."""
    rows = [(stage, f"{seconds:.1f}") for stage, seconds in found.seconds.items() if seconds >= 0.05]
    rows.append(("in all", f"{found.total_seconds:.1f}"))
    memory = f"{size_text(found.host_bytes)} on the host"
    if found.device_bytes is not None:
        memory = f"{size_text(found.device_bytes)} on the device, {memory}"
    state = f", {size_text(found.state_bytes)} beside it meanwhile" if found.state_bytes else ""
    scratch = f", {size_text(found.scratch_bytes)} of temporary files" if found.scratch_bytes else ""
    return (
        f"{table(('stage', 'seconds'), rows)}\n"
        f"About {clock_text(found.total_seconds)}, by {found.measured_blocks} measured block"
        f"{'' if found.measured_blocks == 1 else 's'}. Peak memory: {memory}.\n"
        f"Disk: {size_text(found.out_bytes)} for OUT{state}{scratch}. Nothing was written."
    )


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
