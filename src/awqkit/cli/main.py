"""`awqkit VERB ...`: find the verb, run it, turn what it raises into one line and an exit code.

    0    done                          1    failed: input, output, disk, memory, or a bug
    2    wrong use                     130, 143    interrupted by Ctrl-C, by SIGTERM

A new verb is a file with `SUMMARY`, `build_parser()` and `run(args, console)`, and a line in `VERBS`.
Nothing here or in a verb's parser imports torch: help and wrong use answer at once.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from types import ModuleType

from awqkit.cli import compare, convert, demo, evaluate, folds, inspect, quantize
from awqkit.cli.allocator import grow_segments
from awqkit.cli.arguments import Parser, closest
from awqkit.cli.console import Console
from awqkit.cli.failure import CommandLineError, report_failure
from awqkit.cli.launched import follows, num_ranks
from awqkit.cli.signals import unwind_on_signals
from awqkit.imports import freeze_imports

VERBS: dict[str, ModuleType] = {
    "quantize": quantize,
    "compare": compare,
    "evaluate": evaluate,
    "folds": folds,
    "inspect": inspect,
    "convert": convert,
    "demo": demo,
}

_DESCRIPTION = """\
Turns a bf16 language model into a low-bit checkpoint that vLLM, SGLang and
transformers load.
"""

_EPILOG = """\
start here:
  awqkit demo                  a small model, quantized and measured
  awqkit quantize MODEL OUT    your own model: a folder or a hub id
  awqkit quantize --help       every verb explains itself with examples
"""


def command() -> int:
    """`main` for a process of its own, which returns to nothing but its end."""
    freeze_imports()
    try:
        return main()
    finally:
        gc.freeze()  # else Python looks through all that torch and transformers hold once more: a second


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's) and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    prog = f"awqkit {words[0]}" if words and words[0] in VERBS else "awqkit"
    grow_segments()
    with unwind_on_signals():
        try:
            _dispatch(words)
        except SystemExit as stop:  # argparse leaves this way after --help and --version
            return stop.code if isinstance(stop.code, int) else 0
        except BaseException as error:
            return report_failure(error, prog)
    return 0


def _dispatch(words: list[str]) -> None:
    top = build_parser()
    if not words:
        top.print_help()
        return
    if words[0].startswith("-"):
        top.parse(words)  # --help and --version end here, anything else is wrong use
        raise CommandLineError("name a verb first", top.prog)
    if words[0] not in VERBS:
        raise CommandLineError(
            f"no verb {words[0]!r}{closest(words[0], VERBS)}: there are {', '.join(VERBS)}", top.prog
        )
    verb = VERBS[words[0]]
    args = verb.build_parser().parse(words[1:])
    if num_ranks() > 1 and verb is not quantize:
        raise CommandLineError(
            f"{words[0]} runs in one process, and {num_ranks()} were started: leave torchrun out", f"awqkit {words[0]}"
        )
    verb.run(args, Console(quiet=args.quiet, follows=follows()))


def build_parser() -> Parser:
    """The parser of `awqkit` itself: --help and --version; verbs have their own."""
    verbs = "\n".join(f"  {name:<12} {verb.SUMMARY}" for name, verb in VERBS.items())
    parser = Parser(
        "awqkit",
        usage="awqkit VERB ... | --help | --version",
        description=f"{_DESCRIPTION}\nverbs:\n{verbs}",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> None:
        from awqkit import __version__

        Console().result(f"awqkit {__version__}")
        parser.exit()
