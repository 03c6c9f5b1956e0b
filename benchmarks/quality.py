"""KL and perplexity of packed and loaded checkpoints on SmolLM2-135M, several calibration seeds, as ratios to RTN.

    python benchmarks/quality.py --device cuda                full size: 128 rows, 60 windows, seeds 0 1 2
    python benchmarks/quality.py --samples 16 --windows 16 --seeds 0       a size for two CPU cores

Each row of the table is `awqkit.quantize` to a folder, then `evaluate` of that folder against the original, both in
float32. far: WikiText-2 test, near: books like the calibration text.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from bench import DATA, RESULTS, environment, save, text_files

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
    "autoawq": {"method": "awq", "importance": "mean-abs", "alpha_search": "layer", "clip": "shared"},
    "awq-no-clip": {"method": "awq", "clip": "none"},
    "awq": {"method": "awq"},
    "fast": {"quality": "fast"},
    "fast-layer": {"quality": "fast", "alpha_search": "layer"},
    "fast-square": {"quality": "fast", "importance": "square"},
}
SEEDLESS = ("rtn",)


def main() -> None:
    """Run the table and write its JSON."""
    args = _arguments()
    files = text_files(args.data)
    device = choose_device(args.device)
    model = args.model or smollm2(args.gguf, emit=print)
    encoder = load_text_encoder(model)
    windows = {name: text_windows((_text(files[name]),), encoder, SEQ_LEN, args.windows, name).used for name in TESTS}
    calibration = text_windows((_text(files["calibration"]),), encoder, SEQ_LEN, None, "calibration").all
    original = load_checkpoint(Checkpoint.open(model), torch.float32, device)
    start = len(encoder.start_tokens)
    base = {name: score(original, rows, start, None, device).perplexity for name, rows in windows.items()}
    print(f"original: perplexity far {base['far']:.3f}, near {base['near']:.3f}", flush=True)
    rows: list[dict[str, Any]] = []
    for method in args.methods:
        for seed in args.seeds[:1] if method in SEEDLESS else args.seeds:
            recipe = _recipe(method, seed, args)
            with tempfile.TemporaryDirectory() as scratch:
                began = time.monotonic()
                done = quantize(
                    model, Path(scratch) / "out", recipe, calibration=_rows(calibration, args.samples, seed),
                    options=RunOptions(device=args.device),
                )  # fmt: skip
                seconds = time.monotonic() - began
                loaded = load_checkpoint(Checkpoint.open(done.directory), torch.float32, device)
                found = {name: score(loaded, part, start, original, device) for name, part in windows.items()}
            rows.append(_row(method, seed, seconds, found, len(done.report.fallbacks)))
            print(rows[-1], flush=True)
    table = _table(rows, base)
    print("\n".join(_lines(table)))
    result = {"environment": environment(device), "model": model.name, "settings": vars(args), "original": base}
    result["settings"] = {key: _plain(value) for key, value in result["settings"].items()}
    save(args.name, {**result, "table": table, "rows": rows}, args.results)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint folder (default: SmolLM2-135M, fetched once)")
    parser.add_argument("--gguf", type=Path, help="SmolLM2's GGUF file, where it cannot be fetched")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--methods", nargs="+", default=["rtn", "autoawq", "awq", "fast"], choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--name", default="quality", help="file name of the result")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def _text(path: Path) -> str:
    """The whole file as one text, document separators included: the fixed conditions of the published figures."""
    return path.read_text(encoding="utf-8")


def _rows(windows: torch.Tensor, samples: int, seed: int) -> list[list[int]]:
    """`samples` windows chosen by the seed and an eighth more, which `quantize` holds out: every ninth row."""
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, held_out = order[:samples], order[samples : samples + samples // 8]
    for position, index in enumerate(held_out):
        chosen.insert(9 * position + 8, index)
    return windows[chosen].tolist()


def _recipe(method: str, seed: int, args: argparse.Namespace) -> Recipe:
    return Recipe.from_choices(
        {**METHODS[method], "group_size": GROUP_SIZE, "samples": args.samples, "seq_len": SEQ_LEN, "seed": seed}
    )


def _row(method: str, seed: int, seconds: float, found: dict[str, Any], fallbacks: int) -> dict[str, Any]:
    row: dict[str, Any] = {"method": method, "seed": seed, "seconds": round(seconds, 2), "fallbacks": fallbacks}
    for name, result in found.items():
        row |= {f"kl_{name}": result.kl, f"perplexity_{name}": result.perplexity, f"top1_{name}": result.top1_agreement}
    return row


def _table(rows: list[dict[str, Any]], base: dict[str, float]) -> list[dict[str, Any]]:
    plain = next((row for row in rows if row["method"] == "rtn"), None)
    table = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        line: dict[str, Any] = {
            "method": method,
            "seeds": len(own),
            "seconds": round(mean(row["seconds"] for row in own), 2),
        }
        for name in TESTS:
            line[f"kl_{name}"] = mean(row[f"kl_{name}"] for row in own)
            line[f"perplexity_{name}"] = mean(row[f"perplexity_{name}"] for row in own)
            if plain is not None:
                gap = plain[f"perplexity_{name}"] - base[name]
                line[f"kl_ratio_{name}"] = line[f"kl_{name}"] / plain[f"kl_{name}"]
                line[f"gap_closed_{name}"] = (plain[f"perplexity_{name}"] - line[f"perplexity_{name}"]) / gap
        table.append(line)
    return table


def _lines(table: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"{'method':14} {'KL far':>8} {'÷ RTN':>7} {'KL near':>8} {'÷ RTN':>7} {'ppl far':>8} {'ppl near':>8} {'s':>7}"
    ]
    for line in table:
        lines.append(
            f"{line['method']:14} {line['kl_far']:8.4f} {line.get('kl_ratio_far', 0):7.3f} {line['kl_near']:8.4f} "
            f"{line.get('kl_ratio_near', 0):7.3f} {line['perplexity_far']:8.3f} {line['perplexity_near']:8.3f} "
            f"{line['seconds']:7.1f}"
        )
    return lines


def _plain(value: object) -> object:
    return value.name if isinstance(value, Path) else value


if __name__ == "__main__":
    main()
