"""`estimate`: how long `quantize` would take, and what memory and disk it would need."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from awqkit.api.calibration_rows import CalibrationRows, enough_to_check
from awqkit.api.device import choose_device
from awqkit.api.generated_rows import why_not_whole
from awqkit.api.given_model import GivenModel
from awqkit.api.quantize import planned_run
from awqkit.errors import UsageError
from awqkit.events import Emit, ignore_events
from awqkit.model.plain_model import PlainModel
from awqkit.options import RunOptions
from awqkit.pipeline.activations import TokenRows
from awqkit.pipeline.estimate import Estimate as Estimate
from awqkit.pipeline.estimate import estimate_run
from awqkit.pipeline.free_memory import device_memory_at_most
from awqkit.recipe import DEFAULT_QUALITY, Recipe


def estimate(
    model: str | Path | PlainModel,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    calibration: str | Path | Sequence[Sequence[int]] | torch.Tensor | None = None,
    exclude_modules: frozenset[str] = frozenset(),
    options: RunOptions | None = None,
    emit: Emit = ignore_events,
) -> Estimate:
    """What `quantize` of the same arguments would take; nothing is written. Raises AwqkitError, as `quantize` would.

    A block of each shape is taken through the steps of the run, on as many rows as fill one batch.
    """
    started = time.monotonic()
    recipe, options, out = recipe or Recipe.preset(DEFAULT_QUALITY), options or RunOptions(), Path(out)
    with device_memory_at_most(choose_device(options.device), options.device_memory):
        planned = planned_run(model, out, recipe, calibration, exclude_modules, options, emit)
        rows, generated, held_out = planned.rows, (0, 0), None
        if rows is not None:
            generated = _generated(planned.given, rows, recipe, planned.job.device)
            held_out = _checked(rows, generated[1])
        calibration_rows = None if rows is None else rows.calibration
        try:
            return estimate_run(
                planned.job, calibration_rows, held_out, generated, out.absolute(), time.monotonic() - started, emit
            )
        except ValueError as error:
            raise UsageError(f"--estimate does not know this model: {error}; quantize it without") from error


def _generated(given: GivenModel, rows: CalibrationRows, recipe: Recipe, device: torch.device) -> tuple[int, int]:
    """How many rows the model will write, for calibration and held out."""
    if given.folder is None or why_not_whole(given.folder, device) is not None:
        return 0, 0
    return round(recipe.generated * rows.summary.rows), round(recipe.generated * rows.summary.held_out_rows)


def _checked(rows: CalibrationRows, generated: int) -> TokenRows | None:
    """The held-out rows that the check will see, with others of the text in the place of generated ones."""
    if rows.held_out is None:
        return None
    more = rows.calibration.rows(slice(0, generated))
    return enough_to_check(replace(rows, held_out=rows.held_out.joined(more))).held_out
