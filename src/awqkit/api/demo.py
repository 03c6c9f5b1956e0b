"""`demo`: a real model quantized by textbook methods and by presets, measured on text that none saw; one is saved."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from awqkit.api.compare import Comparison, ComparisonRow, compare
from awqkit.api.device import choose_device
from awqkit.api.evaluate import score, text_windows
from awqkit.api.quantize import QuantizeResult, quantize
from awqkit.api.report_page import check_report_path, write_report
from awqkit.api.smollm2 import smollm2
from awqkit.calibration.builtin import module_sources
from awqkit.calibration.sources import Documents
from awqkit.checkpoint.output import refuse_output
from awqkit.checkpoint.reader import Checkpoint
from awqkit.checkpoint.reports import read_timings
from awqkit.decisions import as_json
from awqkit.demo.held_out import HELD_OUT_MODULES
from awqkit.demo.model import embedded_model
from awqkit.demo.smollm2 import GROUP_SIZE
from awqkit.errors import OutputError, UsageError
from awqkit.evaluation.load import load_checkpoint
from awqkit.events import Emit, ignore_events
from awqkit.model.transformers_bridge import load_text_encoder
from awqkit.options import RunOptions
from awqkit.pipeline.compare import OBSERVE
from awqkit.pipeline.course import START
from awqkit.recipe import DEFAULT_QUALITY, Recipe

_SEQ_LEN = 512
# Without `best`, which takes several times as long as all of these: a demo has to end while somebody watches.
_COMPARED = ("fp", "rtn", "gptq", "awq-clip", "fast")
_NEED_NO_TEXT = ("rtn",)
_EXCLUDED = frozenset(HELD_OUT_MODULES)


@dataclass(frozen=True, slots=True)
class DemoSize:
    """How much a demo looks at: calibration rows, windows to evaluate on, and the group size (None: chosen)."""

    samples: int
    windows: int
    group_size: int | None


_SIZES = {"embedded": DemoSize(24, 16, None), "smollm2": DemoSize(32, 12, GROUP_SIZE)}


@dataclass(frozen=True, slots=True)
class DemoResult:
    """rows: the table; seconds are what each method takes alone. directory: the saved checkpoint, of the last row.

    report_page: the page beside it. model: what was quantized.
    """

    rows: tuple[ComparisonRow, ...]
    directory: Path
    report_page: Path
    model: Path


def demo(
    model: str = "embedded",
    out: str | Path | None = None,
    *,
    options: RunOptions | None = None,
    emit: Emit = ignore_events,
) -> DemoResult:
    """Quantize the embedded model ("embedded") or SmolLM2-135M ("smollm2") by several methods, and compare them.

    out: where the default preset's checkpoint goes, `awqkit-demo` here where None; the report page goes beside it, as
    OUT-report.html. Calibrated on the builtin text; evaluated on standard library modules that the embedded model was
    not trained on and calibration leaves out. Raises AwqkitError.
    """
    if model not in _SIZES:
        raise UsageError(f"demo model {model!r} is not known; it takes one of {', '.join(_SIZES)}")
    options, size = options or RunOptions(), _SIZES[model]
    out = Path("awqkit-demo") if out is None else Path(out)
    page = out.with_name(f"{out.name}-report.html")
    folder = embedded_model() if model == "embedded" else smollm2(emit=emit)
    refuse_output(out, folder, options.overwrite)
    check_report_path(page, out)
    if page.exists() and not options.overwrite:
        raise OutputError(f"{page}: exists; give another --out, or --overwrite to replace both")
    text = Documents("held-out standard library modules", tuple(module_sources(HELD_OUT_MODULES)))
    others = compare(
        folder, text, methods=_COMPARED, group_size=size.group_size, samples=size.samples, seq_len=_SEQ_LEN,
        windows=size.windows, exclude_modules=_EXCLUDED, options=options, emit=emit,
    )  # fmt: skip
    recipe = Recipe.preset(DEFAULT_QUALITY, group_size=size.group_size, samples=size.samples, seq_len=_SEQ_LEN)
    saved = quantize(folder, out, recipe, exclude_modules=_EXCLUDED, options=options, emit=emit)
    timings = read_timings(saved.directory)
    last = _saved_row(saved, timings, folder, text, size.windows, options, emit)
    rows = (*_seconds_alone(others), last)
    write_report(page, saved.report.to_json(), timings, [as_json(row) for row in rows])
    return DemoResult(rows, saved.directory, page, folder)


def _seconds_alone(comparison: Comparison) -> list[ComparisonRow]:
    """The rows with the shared work added to each that would have had to do it."""
    shared = sum(comparison.shared_seconds.get(stage, 0.0) for stage in (START, OBSERVE))
    return [
        row if row.seconds is None or row.method in _NEED_NO_TEXT else replace(row, seconds=row.seconds + shared)
        for row in comparison.rows
    ]


def _saved_row(
    saved: QuantizeResult,
    timings: dict[str, Any],
    folder: Path,
    text: Documents,
    max_windows: int,
    options: RunOptions,
    emit: Emit,
) -> ComparisonRow:
    """What was written, loaded as its readers load it and measured on the windows that the others were measured on."""
    device, encoder = choose_device(options.device), load_text_encoder(folder)
    windows = text_windows(text.texts, encoder, _SEQ_LEN, max_windows, text.label).used
    original, loaded = (
        load_checkpoint(Checkpoint.open(place), torch.float32, device) for place in (folder, saved.directory)
    )
    found = score(loaded, windows, len(encoder.start_tokens), original, device, emit)
    return ComparisonRow(
        method=saved.report.recipe.name,
        bits=saved.report.recipe.bits,
        group_size=saved.report.group_size,
        bits_per_weight=round(saved.report.bits_per_weight, 4),
        text=text.label,
        perplexity=found.perplexity,
        kl=found.kl,
        top1_agreement=found.top1_agreement,
        seconds=sum(timings["stages"].values()),
        num_fallbacks=len(saved.report.fallbacks),
    )
