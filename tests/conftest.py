"""Makes `tiny_models` importable from every test folder: pytest puts this file's folder on the path."""

from __future__ import annotations

import os

# Read when torch is imported. Tiny products gain nothing from threads, and two programs whose OpenMP threads spin for
# each other on two cores were measured twenty times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
