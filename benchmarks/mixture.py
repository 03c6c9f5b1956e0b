"""A trained mixture of experts beside a dense model of the same text: KL ÷ plain rounding's, and the router's part.

    python tools/train_mixture.py --out MIXTURE --device cuda
    python benchmarks/mixture.py MIXTURE --device cuda              128 rows, 60 windows, seeds 0 1 2

Both models learned from the standard library; calibration is the builtin text, evaluation the modules that neither saw.
`skipped` is the same checkpoint with the routers as they were, as a fold that forgets them would leave them: the norm
before the experts is divided by s, and the router reads it uncompensated.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from bench import RESULTS, environment, save, write
from torch import nn

from awqkit import Recipe, RunOptions, quantize
from awqkit.api.device import choose_device
from awqkit.api.evaluate import score, text_windows
from awqkit.calibration.builtin import module_sources
from awqkit.checkpoint.reader import Checkpoint
from awqkit.demo.held_out import HELD_OUT_MODULES
from awqkit.demo.model import embedded_model
from awqkit.evaluation.evaluate import Evaluation
from awqkit.evaluation.load import load_checkpoint
from awqkit.model.transformers_bridge import load_text_encoder

SEQ_LEN, GROUP_SIZE = 512, 64
SKIPPED = "skipped"
CHOOSES = "chooses experts"  # in the reason for which a router is kept


def main() -> None:
    """Run the table; its JSON is written after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixture", type=Path, metavar="MIXTURE", help="a folder of train_mixture.py")
    parser.add_argument("--methods", nargs="+", default=["rtn", "fast", "balanced"])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--name", default="mixture")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    device = choose_device(args.device)
    head = {"environment": environment(device), "settings": {key: str(value) for key, value in vars(args).items()
            if key not in ("mixture", "results")}}  # fmt: skip
    rows: list[dict[str, Any]] = []
    for kind, folder in (("dense", embedded_model()), ("mixture", args.mixture)):
        encoder = load_text_encoder(folder)
        windows = text_windows(tuple(module_sources(HELD_OUT_MODULES)), encoder, SEQ_LEN, args.windows, "held out").used
        original = load_checkpoint(Checkpoint.open(folder), torch.float32, device)
        perplexity = score(original, windows, len(encoder.start_tokens), None, device).perplexity
        head[f"{kind}_perplexity"] = perplexity
        head[f"{kind}_parameters"] = sum(value.numel() for value in original.parameters())
        print(f"{kind}: perplexity {perplexity:.3f}", flush=True)

        def scored(model: nn.Module, original: nn.Module = original, windows: torch.Tensor = windows,
                   start: int = len(encoder.start_tokens)) -> Evaluation:  # fmt: skip
            return score(model, windows, start, original, device)

        for bits in args.bits:
            for method in args.methods:
                for seed in args.seeds[:1] if method == "rtn" else args.seeds:
                    for name, found in _measured(folder, recipe_of(method, bits, seed, args), original, scored, device):
                        row = {"model": kind, "bits": bits, "method": f"{method}{name}", "seed": seed}
                        row |= {"kl": found.kl, "perplexity": found.perplexity, "top1": found.top1_agreement}
                        rows.append(row)
                        print(rows[-1], flush=True)
                        write(args.name, {**head, "table": table_of(rows), "rows": rows}, args.results)
    for row in table_of(rows):
        print(row)
    save(args.name, {**head, "table": table_of(rows), "rows": rows}, args.results)


def recipe_of(method: str, bits: int, seed: int, args: argparse.Namespace) -> Recipe:
    """The recipe of a row."""
    choices: dict[str, Any] = {"method": method} if method == "rtn" else {"quality": method}
    form = "awq" if bits == 4 else "compressed-tensors"
    grid = {"bits": bits, "group_size": GROUP_SIZE, "format": form}
    return Recipe.from_choices({**choices, **grid, "samples": args.samples, "seq_len": SEQ_LEN, "seed": seed})


def _measured(
    folder: Path, recipe: Recipe, original: nn.Module, scored: Any, device: torch.device
) -> list[tuple[str, Evaluation]]:
    """The checkpoint as it is loaded, and with the routers put back where there are any that were compensated."""
    with tempfile.TemporaryDirectory() as scratch:
        done = quantize(
            folder, Path(scratch) / "out", recipe, exclude_modules=frozenset(HELD_OUT_MODULES),
            options=RunOptions(device=str(device)),
        )  # fmt: skip
        model = load_checkpoint(Checkpoint.open(done.directory), torch.float32, device)
    found = [("", scored(model))]
    routers = [keep.name for block in done.report.blocks for keep in block.kept if CHOOSES in keep.reason]
    if routers and recipe.scales_channels:
        with torch.no_grad():
            for name in routers:
                model.get_parameter(f"{name}.weight").copy_(original.get_parameter(f"{name}.weight"))
        found.append((f" {SKIPPED}", scored(model)))
    return found


def table_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, KL also as a ratio to plain rounding's of the same model and bits."""
    table = []
    for key in dict.fromkeys((row["model"], row["bits"], row["method"]) for row in rows):
        found = [row for row in rows if (row["model"], row["bits"], row["method"]) == key]
        plain = [row["kl"] for row in rows if (row["model"], row["bits"], row["method"]) == (*key[:2], "rtn")]
        kl = mean(row["kl"] for row in found)
        table.append({
            "model": key[0], "bits": key[1], "method": key[2], "seeds": len(found), "kl": kl,
            "kl_ratio": kl / mean(plain) if plain else None, "perplexity": mean(row["perplexity"] for row in found),
        })  # fmt: skip
    return table


if __name__ == "__main__":
    main()
