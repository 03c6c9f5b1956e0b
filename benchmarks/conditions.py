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
from bench import DATA, RESULTS, text_files
from torch import Tensor, nn

from awqkit import Recipe, RunOptions, quantize
from awqkit.api.device import choose_device
from awqkit.api.evaluate import score, text_windows
from awqkit.api.smollm2 import smollm2
from awqkit.checkpoint.reader import Checkpoint
from awqkit.evaluation.load import load_checkpoint
from awqkit.model.transformers_bridge import load_text_encoder

GROUP_SIZE, SEQ_LEN = 64, 512
TESTS = ("far", "near")
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
}
SEEDLESS = ("rtn",)


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
    parser.add_argument("--methods", nargs="+", default=methods, choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--name", default=name, help="file name of the result")
    parser.add_argument("--results", type=Path, default=RESULTS)


def open_conditions(args: argparse.Namespace) -> Conditions:
    """Model, tokenized texts and device that the shared arguments name. Exits where the texts are not here."""
    files = text_files(args.data)
    device = choose_device(args.device)
    model = args.model or smollm2(args.gguf, emit=print)
    encoder = load_text_encoder(model)
    cut = {name: text_windows((whole_text(path),), encoder, SEQ_LEN, None, name).all for name, path in files.items()}
    windows = {name: cut[name][: args.windows] for name in TESTS}
    return Conditions(model, device, windows, cut["calibration"], len(encoder.start_tokens))


def recipe_of(method: str, seed: int, args: argparse.Namespace) -> Recipe:
    """The recipe of a method of the table under the fixed conditions."""
    return Recipe.from_choices(
        {**METHODS[method], "group_size": GROUP_SIZE, "samples": args.samples, "seq_len": SEQ_LEN, "seed": seed}
    )


def measure(
    conditions: Conditions, recipe: Recipe, seed: int, *, model: Path | None = None, reference: nn.Module
) -> dict[str, Any]:
    """Quantize, load and score: seconds, fallbacks, and KL, perplexity and top-1 agreement by text.

    model: another folder than the conditions' own. reference: the loaded float model that KL is measured from.
    """
    with tempfile.TemporaryDirectory() as scratch:
        began = time.monotonic()
        done = quantize(
            model or conditions.model, Path(scratch) / "out", recipe,
            calibration=calibration_rows(conditions.calibration, recipe.samples, seed),
            options=RunOptions(device=str(conditions.device)),
        )  # fmt: skip
        seconds = time.monotonic() - began
        found = conditions.score(conditions.load(done.directory), reference)
    row: dict[str, Any] = {"seconds": round(seconds, 2), "fallbacks": len(done.report.fallbacks)}
    for name, result in found.items():
        row |= {f"kl_{name}": result.kl, f"perplexity_{name}": result.perplexity, f"top1_{name}": result.top1_agreement}
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


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as JSON-able values, paths by their names only."""
    return {key: value.name if isinstance(value, Path) else value for key, value in vars(args).items()}
