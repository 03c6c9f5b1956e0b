"""How torch hands out the memory of a GPU, which it reads from the environment when it is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def grow_segments(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have pieces of memory that lie side by side be one again, where the user has not said otherwise.

    A block has tensors of hundreds of megabytes in a dozen sizes. Segments of fixed size are left with gaps between
    them, a fifth of 6 GB where a block of a 7B model is quantized in that. torch does this on Linux alone.
    """
    if sys.platform == "linux" and not any(name in environment for name in _NAMES):
        environment[_NAMES[0]] = "expandable_segments:True"
