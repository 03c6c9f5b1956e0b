"""`demo`: a real model quantized by plain rounding and by AWQ, measured on text that neither saw, and saved."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from awqkit.api.device import choose_device
from awqkit.api.evaluate import score, text_windows
from awqkit.api.quantize import quantize
from awqkit.api.smollm2 import smollm2
from awqkit.calibration.builtin import module_sources
from awqkit.checkpoint.output import refuse_output
from awqkit.checkpoint.reader import Checkpoint
from awqkit.demo.held_out import HELD_OUT_MODULES
from awqkit.demo.model import embedded_model
from awqkit.demo.smollm2 import GROUP_SIZE
from awqkit.errors import UsageError
from awqkit.evaluation.load import load_checkpoint
from awqkit.events import Caution, Emit, Notice, ignore_events
from awqkit.model.transformers_bridge import load_text_encoder
from awqkit.options import RunOptions
from awqkit.recipe import DEFAULT_QUALITY, Recipe

_SEQ_LEN = 512


@dataclass(frozen=True, slots=True)
class DemoSize:
    """How much a demo looks at: calibration rows, windows to evaluate on, and the group size (None: chosen)."""

    samples: int
    windows: int
    group_size: int | None


_SIZES = {"embedded": DemoSize(32, 24, None), "smollm2": DemoSize(48, 12, GROUP_SIZE)}


@dataclass(frozen=True, slots=True)
class DemoRow:
    """One line of the table. kl, top1_agreement: against the original, None for itself. seconds: to quantize."""

    method: str
    perplexity: float
    kl: float | None
    top1_agreement: float | None
    size_bytes: int
    seconds: float | None


@dataclass(frozen=True, slots=True)
class DemoResult:
    """rows: the table. directory: the saved AWQ checkpoint. model: what was quantized."""

    rows: tuple[DemoRow, ...]
    directory: Path
    model: Path


def demo(
    model: str = "embedded",
    out: str | Path | None = None,
    *,
    options: RunOptions | None = None,
    emit: Emit = ignore_events,
) -> DemoResult:
    """Quantize the embedded model ("embedded") or SmolLM2-135M ("smollm2") and compare the results with the original.

    out: where the AWQ checkpoint goes, `awqkit-demo` here where None. Calibrated on the builtin text; evaluated on
    standard library modules that the embedded model was not trained on and calibration leaves out. Raises AwqkitError.
    """
    if model not in _SIZES:
        raise UsageError(f"demo model {model!r} is not known; it takes one of {', '.join(_SIZES)}")
    options, size = options or RunOptions(), _SIZES[model]
    out = Path("awqkit-demo") if out is None else Path(out)
    folder = embedded_model() if model == "embedded" else smollm2(emit=emit)
    refuse_output(out, folder, options.overwrite)
    device = choose_device(options.device)
    encoder = load_text_encoder(folder)
    texts = tuple(module_sources(HELD_OUT_MODULES))
    windows = text_windows(texts, encoder, _SEQ_LEN, size.windows, "held-out modules")
    emit(Notice(f"evaluating on {len(windows.used)} windows of {_SEQ_LEN} tokens of held-out standard library modules"))
    original = load_checkpoint(Checkpoint.open(folder), torch.float32, device)
    judge = _Judge(original, windows.used, len(encoder.start_tokens), device, emit)
    rows = [judge.row("original", folder, None)]
    exclude = frozenset(HELD_OUT_MODULES)
    with tempfile.TemporaryDirectory(prefix="awqkit-demo-") as scratch:
        plain = Recipe.method("rtn", group_size=size.group_size)
        rtn = quantize(folder, Path(scratch) / "rtn", plain, options=options, emit=_without_cautions(emit))
        rows.append(judge.row("rtn", rtn.directory, rtn.seconds))
    recipe = Recipe.preset(DEFAULT_QUALITY, group_size=size.group_size, samples=size.samples, seq_len=_SEQ_LEN)
    chosen = quantize(folder, out, recipe, exclude_modules=exclude, options=options, emit=emit)
    rows.append(judge.row(f"awq ({DEFAULT_QUALITY})", chosen.directory, chosen.seconds))
    return DemoResult(tuple(rows), chosen.directory, folder)


def _without_cautions(emit: Emit) -> Emit:
    """The saved checkpoint's cautions are worth a line, the scratch one's would only repeat them."""
    return lambda event: None if isinstance(event, Caution) else emit(event)


@dataclass(frozen=True, slots=True)
class _Judge:
    original: nn.Module
    windows: Tensor
    num_start_tokens: int
    device: torch.device
    emit: Emit

    def row(self, method: str, folder: Path, seconds: float | None) -> DemoRow:
        """The table's line for the checkpoint in `folder`; no seconds for the original."""
        checkpoint = Checkpoint.open(folder)
        same = seconds is None
        loaded = self.original if same else load_checkpoint(checkpoint, torch.float32, self.device)
        reference = None if same else self.original
        found = score(loaded, self.windows, self.num_start_tokens, reference, self.device, self.emit)
        return DemoRow(method, found.perplexity, found.kl, found.top1_agreement, checkpoint.total_bytes, seconds)
