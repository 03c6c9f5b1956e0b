"""The fixed conditions of the quality figures: methods, windows, calibration rows, and one measured checkpoint.

Non-overlapping windows of 512 tokens, each with what the tokenizer puts before a text; groups of 64; calibration
windows chosen by a seeded permutation. Everything is evaluated from the written folder, in float32.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ablation import ABLATION
from bench import CALIBRATION_FILES, DATA, RESULTS, scratch_folder, text_files
from kept_logits import reference_of
from table import TESTS
from torch import Tensor, nn

from awqkit import Recipe, RunOptions, quantize
from awqkit.api.device import choose_device
from awqkit.api.evaluate import score, text_windows
from awqkit.api.smollm2 import smollm2
from awqkit.calibration.sources import BUILTIN, read_documents
from awqkit.checkpoint.reader import Checkpoint
from awqkit.evaluation.load import load_checkpoint
from awqkit.model.transformers_bridge import load_text_encoder

GROUP_SIZE, SEQ_LEN = 64, 512
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq"},
    "autoawq": {"method": "awq", "importance": "mean-abs", "alpha_search": "layer", "clip": "shared"},
    "awq-no-clip": {"method": "awq", "clip": "none"},
    "awq": {"method": "awq"},
    "fast": {"quality": "fast"},
    "fast-layer": {"quality": "fast", "alpha_search": "layer"},
    "fast-square": {"quality": "fast", "importance": "square"},
    "balanced": {"quality": "balanced"},
    "best": {"quality": "best"},
    "w8a8": {"method": "smoothquant", "channel_scale": "none"},
    "smoothquant": {"method": "smoothquant"},
    **ABLATION,
}
SEEDLESS = ("rtn", "w8a8")
W8A8 = ("w8a8", "smoothquant")  # 8-bit activations: bits and group size are the method's own
SCRATCH_FACTOR = 4  # bytes of a row's files (a float32 twin or peer among them) ÷ bytes of the model


@dataclass(frozen=True)
class Conditions:
    """What every row of a table shares.

    windows: text name -> `[windows, tokens]` to evaluate on. calibration: `[windows, tokens]` to choose rows from.
    num_start_tokens: how many tokens at the start of a window are the tokenizer's own.
    """

    model: Path
    device: torch.device
    windows: dict[str, Tensor]
    calibration: Tensor
    num_start_tokens: int

    def load(self, folder: Path) -> nn.Module:
        """A checkpoint folder, full precision or quantized, in float32."""
        return load_checkpoint(Checkpoint.open(folder), torch.float32, self.device)

    def reference(self, folder: Path) -> nn.Module:
        """What KL to a full-precision folder is measured from: its logits, kept where they fit, or the loaded model."""
        return reference_of(self.load(folder), self.windows, self.device)

    def scratch(self) -> tempfile.TemporaryDirectory[str]:
        """A folder for the files of one row."""
        return scratch_folder(SCRATCH_FACTOR * Checkpoint.open(self.model).total_bytes)

    def score(self, model: nn.Module, reference: nn.Module | None = None) -> dict[str, Any]:
        """The Evaluation of a loaded model by text name."""
        return {
            name: score(model, part, self.num_start_tokens, reference, self.device)
            for name, part in self.windows.items()
        }


def add_arguments(parser: argparse.ArgumentParser, name: str, methods: list[str]) -> None:
    """The arguments that the quality benchmarks share; name: of the result's file, methods: those run by default."""
    parser.add_argument("--model", type=Path, help="a checkpoint folder (default: SmolLM2-135M, fetched once)")
    parser.add_argument("--gguf", type=Path, help="SmolLM2's GGUF file, where it cannot be fetched")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument(
        "--methods",
        nargs="*",
        default=methods,
        choices=list(METHODS),
        metavar="METHOD",
        help=f"from {', '.join(name for name in METHODS if name not in ABLATION)}, and ablation.py",
    )
    parser.add_argument("--calibration", default="books", choices=[*CALIBRATION_FILES, BUILTIN])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--name", default=name, help="file name of the result")
    parser.add_argument("--results", type=Path, default=RESULTS)


def open_conditions(args: argparse.Namespace) -> Conditions:
    """Model, tokenized texts and device that the shared arguments name. Exits where the texts are not here."""
    builtin = args.calibration == BUILTIN
    files = text_files(args.data, "books" if builtin else args.calibration)
    device = choose_device(args.device)
    model = args.model or smollm2(args.gguf, emit=print)
    encoder = load_text_encoder(model)
    cut = {name: text_windows((whole_text(path),), encoder, SEQ_LEN, None, name).all for name, path in files.items()}
    if builtin:
        documents = read_documents(BUILTIN)
        cut["calibration"] = text_windows(documents.texts, encoder, SEQ_LEN, None, BUILTIN).all
    windows = {name: cut[name][: args.windows] for name in TESTS}
    return Conditions(model, device, windows, cut["calibration"], len(encoder.start_tokens))


def recipe_of(method: str, seed: int, args: argparse.Namespace, bits: int = 4) -> Recipe:
    """The recipe of a method of the table under the fixed conditions, in the format that holds the bits."""
    grid = {} if method in W8A8 else {"bits": bits, "group_size": GROUP_SIZE, "format": format_of(bits)}
    return Recipe.from_choices({**METHODS[method], **grid, "samples": args.samples, "seq_len": SEQ_LEN, "seed": seed})


def format_of(bits: int) -> str:
    """The format that a table's rows at these bits are written in."""
    return "awq" if bits == 4 else "compressed-tensors"


def grid_of(method: str, bits: int) -> str:
    """What rows must share to be compared: "INT4 g64", "W8A8"."""
    return "W8A8" if method in W8A8 else f"INT{bits} g{GROUP_SIZE}"


def measure(
    conditions: Conditions, recipe: Recipe, seed: int, *, model: Path | None = None, reference: nn.Module
) -> dict[str, Any]:
    """Quantize, load and score: seconds, fallbacks, peak memory, and KL, perplexity and top-1 agreement by text.

    model: another folder than the conditions' own. reference: what KL is measured from, a `Conditions.reference`.
    """
    cuda = conditions.device.type == "cuda"
    with conditions.scratch() as scratch:
        if cuda:
            torch.cuda.reset_peak_memory_stats(conditions.device)
        held = torch.cuda.memory_allocated(conditions.device) if cuda else 0
        began = time.monotonic()
        done = quantize(
            model or conditions.model, Path(scratch) / "out", recipe,
            calibration=calibration_rows(conditions.calibration, recipe.samples, seed),
            options=RunOptions(device=str(conditions.device)),
        )  # fmt: skip
        seconds = time.monotonic() - began
        peak = torch.cuda.max_memory_allocated(conditions.device) - held if cuda else None
        found = score_folder(conditions, done.directory, reference)
    fallbacks = len(done.report.fallbacks)
    return {"seconds": round(seconds, 2), "peak_device_bytes": peak, "fallbacks": fallbacks, **found}


def score_folder(conditions: Conditions, folder: Path, reference: nn.Module) -> dict[str, Any]:
    """KL, perplexity and top-1 agreement of a checkpoint folder by text, as a row of a table has them."""
    row: dict[str, Any] = {}
    for name, found in conditions.score(conditions.load(folder), reference).items():
        row |= {f"kl_{name}": found.kl, f"perplexity_{name}": found.perplexity, f"top1_{name}": found.top1_agreement}
    return row


def whole_text(path: Path) -> str:
    """The whole file as one text, document separators included: the fixed conditions of the published figures."""
    return path.read_text(encoding="utf-8")


def calibration_rows(windows: Tensor, samples: int, seed: int) -> list[list[int]]:
    """`samples` windows chosen by the seed and an eighth more, which `quantize` holds out: every ninth row."""
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, held_out = order[:samples], order[samples : samples + samples // 8]
    for position, index in enumerate(held_out):
        chosen.insert(9 * position + 8, index)
    return windows[chosen].tolist()


def without_held_out(rows: list[list[int]]) -> list[list[int]]:
    """The rows of `calibration_rows` that a method learns from, for a tool that holds none out."""
    return [row for index, row in enumerate(rows) if index % 9 != 8]


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as JSON-able values, paths by their names only."""
    return {key: _named(value) for key, value in vars(args).items()}


def _named(value: Any) -> Any:
    if isinstance(value, list):
        return [_named(each) for each in value]
    return value.name if isinstance(value, Path) else value
