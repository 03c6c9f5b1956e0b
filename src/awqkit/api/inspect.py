"""`inspect`: the scale analysis of a finished checkpoint, from its awqkit.json; no weights, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awqkit.checkpoint.reports import REPORT_FILE, read_report
from awqkit.decisions import as_json
from awqkit.errors import CheckpointError
from awqkit.report.analysis import (
    AlphaRow,
    ClipRow,
    Fallback,
    ScaleRow,
    alpha_rows,
    clip_rows,
    fallbacks,
    scale_rows,
)
from awqkit.report.report import SCHEMA


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was decided for a checkpoint.

    recipe: all its fields. group_size: the one in use, −1 per channel. linears, kept: quantized, and left in full
    precision. folds, folds_in_use: found, and with s in use. mean_output_errors: of plain rounding and as written, or
    None. scales, alphas, clips: by type of fold or linear; empty where nothing was searched, and scales also where
    the awqkit that wrote the checkpoint did not keep them.
    """

    model: str
    recipe: dict[str, Any]
    group_size: int
    bits_per_weight: float
    calibration: dict[str, Any] | None
    blocks: int
    linears: int
    kept: int
    folds: int
    folds_in_use: int
    mean_output_errors: tuple[float, float] | None
    scales: tuple[ScaleRow, ...]
    alphas: tuple[AlphaRow, ...]
    clips: tuple[ClipRow, ...]
    fallbacks: tuple[Fallback, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON-able values."""
        return as_json(self)


def inspect(directory: str | Path) -> Inspection:
    """What awqkit.json in the folder `directory` says. Raises CheckpointError where that cannot be read."""
    directory = Path(directory)
    report = read_report(directory, SCHEMA)
    try:
        return _inspection(report)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{directory / REPORT_FILE}: is damaged ({type(error).__name__}: {error}); quantize again for a whole one"
        ) from error


def _inspection(report: dict[str, Any]) -> Inspection:
    folds = [fold for block in report["blocks"] for fold in block["folds"]]
    errors = report["mean_output_errors"]
    return Inspection(
        model=report["model"],
        recipe=report["recipe"],
        group_size=report["group_size"],
        bits_per_weight=report["bits_per_weight"],
        calibration=report["calibration"],
        blocks=len(report["blocks"]),
        linears=sum(len(block["linears"]) for block in report["blocks"]),
        kept=sum(len(block["kept"]) for block in report["blocks"]),
        folds=len(folds),
        folds_in_use=sum(fold["fallback"] is None for fold in folds),
        mean_output_errors=None if errors is None else (errors[0], errors[1]),
        scales=tuple(scale_rows(report)),
        alphas=tuple(alpha_rows(report)),
        clips=tuple(clip_rows(report)),
        fallbacks=tuple(fallbacks(report)),
    )
