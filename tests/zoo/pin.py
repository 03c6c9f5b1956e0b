"""Look at every architecture again and write what is found to architectures.json and docs/architectures.md.

    python tests/zoo/pin.py                    all of them
    python tests/zoo/pin.py llama gpt_oss      some; the others stay as they are

What the file says is what `make test-zoo` holds awqkit to, so read the difference before you commit it.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; products this small gain nothing from more
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from architecture_check import NotHandled, outcome_of
from architecture_table import TABLE, table_text
from small_models import PINNED, pinned, registry


def main() -> None:
    """Pin the architectures named on the command line, or all."""
    warnings.filterwarnings("ignore")
    names, known = registry(), pinned()
    for model_type in sys.argv[1:] or names:
        known[model_type] = _entry(model_type, names[model_type], known.get(model_type, {}))
        print(model_type, known[model_type], flush=True)
        _write({name: known[name] for name in names if name in known})


def _entry(model_type: str, class_name: str, before: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = {"class": class_name}
    if "config" in before:
        entry["config"] = before["config"]
    began = time.process_time()
    try:
        entry |= outcome_of(model_type).as_json()
    except NotHandled as error:
        entry |= {"reason": str(error)}
    if time.process_time() - began > SLOW_SECONDS:
        entry["slow"] = True
    return entry


def _write(entries: dict[str, dict[str, Any]]) -> None:
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(entries.items()))
    PINNED.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    TABLE.write_text(table_text(entries), encoding="utf-8")


SLOW_SECONDS = 0.6  # of the processor; slower ones are left to `make test-zoo`

if __name__ == "__main__":
    main()
