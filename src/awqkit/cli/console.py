"""The only place that prints: results to stdout; progress, notices and errors to stderr.

A terminal gets a progress line drawn by rich (progress.py), anything else one plain line per block.
Text that the stream's encoding cannot hold is replaced by its nearest ASCII.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

import rich.console

from awqkit.cli.progress import PlainProgress, TerminalProgress
from awqkit.events import Emit, ignore_events

_ASCII = str.maketrans({
    "→": "->", "←": "<-", "×": "x", "…": "...", "–": "-", "—": "-", "−": "-", "≤": "<=", "≥": ">=", "‖": "||",
    "²": "^2", "α": "alpha", "β": "beta", "√": "sqrt", "·": "*", "│": "|", "─": "-", "━": "-",
    "±": "+-", "≈": "~",
})  # fmt: skip
# Progress bars and advice of the libraries underneath would cut through the progress line.
_LIBRARY_SILENCE = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}


class Console:
    """Where one run of a verb prints. With `quiet` only results appear; nothing where another rank prints for this."""

    def __init__(self, *, quiet: bool = False, follows: bool = False) -> None:
        self._quiet, self.follows = quiet or follows, follows

    @contextmanager
    def listening(self) -> Iterator[Emit]:
        """An event listener for the code that works; its progress line is gone when the `with` block ends."""
        for name, value in _LIBRARY_SILENCE.items():
            os.environ.setdefault(name, value)
        if self._quiet:
            with _no_warnings():
                yield ignore_events
            return
        terminal = rich.console.Console(stderr=True, highlight=False)
        if not terminal.is_terminal or terminal.is_dumb_terminal:
            yield PlainProgress(_to_stderr)
            return
        with TerminalProgress(terminal) as progress:
            yield progress

    def result(self, text: str) -> None:
        """Print what was asked for."""
        if not self.follows:
            _write(sys.stdout, text)

    def hint(self, text: str) -> None:
        """Print what to do next; not with `quiet`."""
        if not self._quiet:
            _write(sys.stdout, text)


def print_error(text: str) -> None:
    """Print `text` to stderr as it is."""
    _write(sys.stderr, text)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as papers print it: no vertical rules, the first column flush left, numbers flush right."""
    widths = [max(len(line[i]) for line in (columns, *rows)) for i in range(len(columns))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))

    def line(cells: Sequence[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return "  ".join([first.strip().ljust(widths[0]), *others])

    return "\n".join([rule, line(columns), rule, *map(line, rows), rule])


def size_text(size_bytes: int) -> str:
    """A number of bytes for people, in powers of ten as disks and hubs count."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.2f} {unit}"
    return f"{size_bytes} B"


def _to_stderr(text: str) -> None:
    _write(sys.stderr, text)


def _write(stream: TextIO, text: str) -> None:
    encoding = stream.encoding or "ascii"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.translate(_ASCII).encode(encoding, "replace").decode(encoding)
    # Flushed at once: a log that is read while the job runs must show life.
    print(text, file=stream, flush=True)


@contextmanager
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
