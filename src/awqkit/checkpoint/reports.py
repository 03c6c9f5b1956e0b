"""What a finished checkpoint says of its making, read back: awqkit.json and the timings. Knows not what is in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from awqkit.errors import CheckpointError

REPORT_FILE = "awqkit.json"
TIMINGS_FILE = "awqkit-timings.json"
_EXPECTED = "give a folder that `awqkit quantize` wrote"


def read_report(directory: Path, schema: int) -> dict[str, Any]:
    """The content of the folder's awqkit.json. Raises CheckpointError unless there is one, of that schema."""
    if not directory.is_dir():
        found = "is a file" if directory.exists() else "no such folder"
        raise CheckpointError(f"{directory}: {found}; {_EXPECTED}")
    file = directory / REPORT_FILE
    if not file.is_file():
        raise CheckpointError(f"{directory}: has no {REPORT_FILE}, so awqkit did not quantize it; {_EXPECTED}")
    content = _read(file)
    found = content.get("schema") if isinstance(content, dict) else None
    if found != schema:
        written = "has no schema" if found is None else f"has schema {found!r}"
        raise CheckpointError(
            f"{file}: {written}, this awqkit reads schema {schema}; use the awqkit that wrote it, or quantize again"
        )
    return content


def read_timings(directory: Path) -> dict[str, Any]:
    """The content of the folder's awqkit-timings.json. Raises CheckpointError where it cannot be read."""
    return _read(directory / TIMINGS_FILE)


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: is not JSON ({error}); quantize again for a whole one") from error
