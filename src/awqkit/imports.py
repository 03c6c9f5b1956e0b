"""How large libraries are imported."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_freezes = False


def freeze_imports() -> None:
    """In a process that is all our own: what is there at the end of an import is never looked through afterwards."""
    global _freezes
    _freezes = True


@contextmanager
def importing() -> Iterator[None]:
    """Inside, Python does not look for garbage.

    torch and transformers make a million objects as they are imported, none of which is garbage. Looking through them
    again and again takes a sixth of the time.
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
