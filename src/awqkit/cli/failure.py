"""What a run ended with, as one line on stderr and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback

from awqkit.cli.console import print_error
from awqkit.cli.launched import follows, num_ranks
from awqkit.cli.signals import Terminated
from awqkit.errors import AwqkitError, UsageError

EXIT_FAILURE, EXIT_WRONG_USE, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# What torch and safetensors (Rust) put into errors of their own classes.
_DISK_FULL_TEXT = "No space left on device"
_KEPT_ATTRIBUTE = "awqkit_kept"  # what a stopped run says of itself, see checkpoint.run_state
_OUT_OF_MEMORY_CLASS = "OutOfMemoryError"  # torch's, told by its name: torch must not be imported for this


class CommandLineError(UsageError):
    """Words on the command line that cannot be understood; `prog` is the command whose help would tell."""

    def __init__(self, message: str, prog: str) -> None:
        super().__init__(message)
        self.prog = prog


def report_failure(error: BaseException, prog: str) -> int:
    """Print what `error` means to a user and return the exit code. `prog` is "awqkit" or "awqkit VERB"."""
    if follows() and isinstance(error, (AwqkitError, KeyboardInterrupt)):  # the first rank tells
        return EXIT_TERMINATED if isinstance(error, Terminated) else getattr(error, "exit_code", EXIT_FAILURE)
    if isinstance(error, Terminated):
        others = " (torchrun ends all ranks when one has ended)" if num_ranks() > 1 else ""
        print_error(f"awqkit: terminated{others}, {_left(error)}")
        return EXIT_TERMINATED
    if isinstance(error, KeyboardInterrupt):
        print_error(f"awqkit: interrupted, {_left(error)}")
        return EXIT_INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return _reader_left()
    if isinstance(error, AwqkitError):
        return _expected(error, prog)
    if _is_disk_full(error):
        where = getattr(error, "filename", None)
        print_error(
            f"awqkit: error: disk full{f' while writing {where}' if where else ''}: "
            f"{_left(error)}, free some space and run again"
        )
        return EXIT_FAILURE
    if isinstance(error, MemoryError) or type(error).__name__ == _OUT_OF_MEMORY_CLASS:
        print_error(f"awqkit: error: out of memory ({_first_sentence(error)}): {_left(error)}")
        return EXIT_FAILURE
    return _bug(error)


def _left(error: BaseException) -> str:
    return getattr(error, _KEPT_ATTRIBUTE, "nothing was left behind")


def _expected(error: AwqkitError, prog: str) -> int:
    text = " ".join(str(error).split())
    if hasattr(error, _KEPT_ATTRIBUTE):
        text = f"{text}; {_left(error)}"
    if error.exit_code != EXIT_WRONG_USE:
        print_error(f"awqkit: error: {text}")
    else:
        prog = getattr(error, "prog", prog)
        print_error(f"{prog}: error: {text.rstrip('.')}; try {prog} --help")
    return error.exit_code


def _reader_left() -> int:
    # Python flushes stdout once more on exit; without this it would complain about the closed pipe there.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_FAILURE


def _bug(error: BaseException) -> int:
    print_error("".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip())
    if hasattr(error, _KEPT_ATTRIBUTE):
        print_error(f"awqkit: {_left(error)}")
    from awqkit import __version__

    print_error(
        "awqkit: this is a bug in awqkit: please report it with the lines above and the command "
        f"(awqkit {__version__}, Python {sys.version.split()[0]})"
    )
    return EXIT_FAILURE


def _is_disk_full(error: BaseException) -> bool:
    return (isinstance(error, OSError) and error.errno in _DISK_FULL) or _DISK_FULL_TEXT in str(error)


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text.split(". ")[0] or "the machine has none left"
