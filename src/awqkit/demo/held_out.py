"""The text that the embedded model was not trained on.

Only names are kept: the running Python has the sources, and `calibration.builtin.module_sources` reads them.
"""

# Pure Python modules of every version from 3.10 on, some 100 000 tokens together. Neither they nor their
# tests took part in training, and calibration for the demo leaves them out as well.
HELD_OUT_MODULES = (
    "bisect",
    "calendar",
    "colorsys",
    "configparser",
    "csv",
    "difflib",
    "fractions",
    "graphlib",
    "heapq",
    "shlex",
    "statistics",
    "textwrap",
)
