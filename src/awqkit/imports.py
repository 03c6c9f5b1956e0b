"""How large libraries are imported."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_freezes = False


def freeze_imports() -> None:
    """From now on nobody looks again through what is there once something was imported: for a process all our own."""
    global _freezes
    _freezes = True


@contextmanager
def importing() -> Iterator[None]:
    """Inside, Python does not look for garbage.

    torch and transformers make a million objects as they are imported, none of which is garbage. Looking through them
    again and again takes a sixth of the time, and a run that then makes objects of its own would do so, too.
    """
    was_looking = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_looking and _freezes:
            gc.freeze()
        if was_looking:
            gc.enable()
