"""What the verbs' parsers share: errors as one line, guesses, checked values, options of every run."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from awqkit.cli.failure import CommandLineError
from awqkit.errors import OutputError, UsageError
from awqkit.imports import importing
from awqkit.options import RunOptions

_MAX_WIDTH = 100
_DTYPE_ALIASES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises CommandLineError, with a guess at what a mistyped option means."""

    def __init__(self, prog: str, *, usage: str, description: str, epilog: str) -> None:
        # An abbreviation that works today is ambiguous when the next option arrives.
        super().__init__(
            prog,
            usage=usage,
            description=description,
            epilog=epilog,
            formatter_class=_formatter,
            allow_abbrev=False,
        )

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """The parsed `words`. Raises CommandLineError; leaves with SystemExit(0) after --help."""
        args, extras = self.parse_known_args(words)
        for word in extras:
            if word.startswith("-"):
                option = word.split("=")[0]
                # argparse has no public list of a parser's options
                self.error(f"no option {option}{closest(option, self._option_string_actions)}")
        if extras:
            self.error(f"unexpected argument {extras[0]!r}")
        return args

    def error(self, message: str) -> NoReturn:
        """Raise CommandLineError; argparse calls this with what it found wrong."""
        raise CommandLineError(message, self.prog)


def closest(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` for the known word that `word` resembles, else an empty text."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def one_of(*choices: str) -> Callable[[str], str]:
    """A `type=` for one of `choices`; argparse's own `choices=` knows no did-you-mean."""

    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(choices)}{closest(text, choices)}")
        return text

    return parse


def dtype_of(*choices: str) -> Callable[[str], str]:
    """A `type=` for one of the torch dtypes `choices`, also by their short names (bf16, fp16, fp32)."""
    check = one_of(*choices)
    return lambda text: check(_DTYPE_ALIASES.get(text, text))


def whole_number(minimum: int) -> Callable[[str], int]:
    """A `type=` for whole numbers of at least `minimum`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]+", text) or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")
        return int(text)

    return parse


def share(text: str) -> float:
    """A `type=` for numbers from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def above_zero(text: str) -> float:
    """A `type=` for finite numbers above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def add_run_options(group: argparse._ArgumentGroup, *, json_content: str, remote_code: bool = True) -> None:
    """Add the options that every verb has to its group "the run"."""
    group.add_argument(
        "--device", type=_device, default="auto", metavar="DEVICE",
        help="auto (a CUDA device where there is one, else the CPU), cpu, cuda or cuda:N (default: auto)",
    )  # fmt: skip
    group.add_argument("--json", type=Path, metavar="PATH", help=f"also write {json_content} to PATH as JSON")
    if remote_code:
        group.add_argument(
            "--trust-remote-code", action="store_true", help="run modelling code that comes with the model"
        )
    group.add_argument("--quiet", action="store_true", help="print results only: no progress, no notices")


def run_options(args: argparse.Namespace, *, overwrite: bool = False) -> RunOptions:
    """The RunOptions of the parsed command line; checks --json too, so that no work is done for nothing."""
    check_json_path(args.json)
    return RunOptions(
        device=args.device, overwrite=overwrite, trust_remote_code=getattr(args, "trust_remote_code", False)
    )


def check_device(device: str) -> None:
    """Raise UsageError for a CUDA device that is not there. Imports torch to see, which takes seconds."""
    if not device.startswith("cuda"):
        return
    with importing():
        import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(device.partition(":")[2] or 0)
    if index >= count:
        found = f"only {count} CUDA device{'s' if count > 1 else ''}" if count else "no CUDA device"
        raise UsageError(f"--device {device}: torch {torch.__version__} finds {found} here; use --device cpu or auto")


def write_json(path: Path | None, content: Any) -> None:
    """Write `content` to `path`, if one was given. Raises OutputError."""
    if path is None:
        return
    try:
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"--json {path}: cannot be written ({error.strerror})") from error


def check_json_path(path: Path | None) -> None:
    """Raise UsageError where `--json` names a place that cannot be written; None is a place not asked for."""
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"--json {path}: is a folder; give the path of a file to write")
    if not path.parent.is_dir():
        raise UsageError(f"--json {path}: there is no folder {path.parent}; make it first or name another path")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"--json {path}: may not be written; name another path")


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", text):
        hint = closest(text, ("auto", "cpu", "cuda"))
        raise argparse.ArgumentTypeError(f"{text!r} is not one of auto, cpu, cuda, cuda:N{hint}")
    return text


def _formatter(prog: str) -> argparse.HelpFormatter:
    width = min(shutil.get_terminal_size().columns, _MAX_WIDTH) - 2
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=width)
