"""Which of several processes this one is, by what torchrun says; nothing here imports torch."""

from __future__ import annotations

import os


def num_ranks() -> int:
    """How many processes were started for one run."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def follows() -> bool:
    """Whether another process prints for this one."""
    return num_ranks() > 1 and os.environ["RANK"] != "0"
