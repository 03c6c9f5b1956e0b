"""The report as a page, written to a file: where it may lie, and the writing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from awqkit.errors import OutputError, UsageError
from awqkit.report.html import render_html


def check_report_path(path: str | Path, out: str | Path | None = None) -> None:
    """Raises UsageError where no page can be written to `path`, so that no work is done for nothing.

    out: the folder that a run will write, which appears only when it is whole; the page cannot lie inside it.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(
            f"--report {path}: is a folder; give the path of a file to write, such as {path / 'report.html'}"
        )
    if path.suffix != ".html":
        raise UsageError(f"--report {path}: is not the name of a page; give one that ends in .html")
    if out is not None:
        real, real_out = Path(os.path.realpath(path)), Path(os.path.realpath(out))
        if real_out == real or real_out in real.parents:
            raise UsageError(
                f"--report {path}: lies inside OUT ({out}), which is written as a whole; name another place"
            )
    if not path.parent.is_dir():
        raise UsageError(f"--report {path}: there is no folder {path.parent}; make it first or name another path")
    if not os.access(path.parent, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise UsageError(f"--report {path}: may not be written; name another path")


def write_report(
    path: str | Path,
    report: Mapping[str, Any] | None,
    timings: Mapping[str, Any] | None,
    comparison: Sequence[Mapping[str, Any]] | None,
) -> None:
    """Write the page to `path`, replacing what is there; the arguments are those of `report.html.render_html`.

    Raises OutputError, and then leaves what was there before.
    """
    path = Path(path)
    page = render_html(report, timings, comparison)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text(page, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OutputError(f"--report {path}: cannot be written ({error.strerror or error})") from error
