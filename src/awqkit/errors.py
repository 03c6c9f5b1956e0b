"""Every error that awqkit raises on purpose.

    AwqkitError
    ├── UsageError          wrong use: an option, a value, a pair of options (exit code 2)
    ├── InputError          something given cannot be used as it is (exit code 1)
    │   ├── CheckpointError     a model folder: missing, truncated, pickle only, already quantized ...
    │   ├── CalibrationError    calibration or evaluation text: empty, binary, too short ...
    │   └── ModelError          a model whose blocks or inputs cannot be found or run
    ├── RankLostError       another rank of a run with several has ended
    ├── OutputError         OUT exists, lies inside MODEL, cannot be written, disk full
    ├── NoRoomError         too little memory for what cannot be made smaller
    └── FormatError         a choice that the on-disk format cannot hold

A message says what was found, where, what was expected and what to do next, in one line.
Anything else that reaches a user is a bug.
"""

from __future__ import annotations

import re

_GIST_CHARS = 160


def gist(error: BaseException) -> str:
    """What code that is not ours says in an error, in one line: the first sentence, and more as far as they fit."""
    first, *others = re.split(r"(?<=[.!?]) +", " ".join(str(error).split()))
    for sentence in others:
        if len(first) + len(sentence) > _GIST_CHARS:
            break
        first = f"{first} {sentence}"
    return first[: 2 * _GIST_CHARS].rstrip(".: ") or type(error).__name__


def first_error(error: BaseException) -> BaseException:
    """The error that this one was raised on the way out of, and so on: torch ends a capture that failed by another."""
    while error.__context__ is not None:
        error = error.__context__
    return error


class AwqkitError(Exception):
    """Base of all errors that are meant for the user; `str(error)` is one line."""

    exit_code = 1


class UsageError(AwqkitError):
    """The command or call asks for something that does not exist or does not go together."""

    exit_code = 2


class InputError(AwqkitError):
    """Something that was given cannot be used as it is."""


class CheckpointError(InputError):
    """A model folder that cannot be read or should not be quantized."""


class CalibrationError(InputError):
    """Calibration or evaluation text that cannot be used."""


class ModelError(InputError):
    """A model that cannot be taken apart or run block by block."""


class OutputError(AwqkitError):
    """The place to write to is taken, forbidden or full."""


class NoRoomError(AwqkitError):
    """The device or the host has too little memory for what cannot be made smaller."""


class RankLostError(AwqkitError):
    """A run on several ranks cannot go on, since one of them has ended; that one, or the first, says why."""


class FormatError(AwqkitError):
    """The chosen format cannot hold what was asked for."""

    exit_code = 2
