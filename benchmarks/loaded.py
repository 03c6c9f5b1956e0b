"""Perplexity of a loaded checkpoint against the same weights held densely, per compute dtype.

    python benchmarks/loaded.py --device cpu

The dense twin gets (q − z) · Δ, computed in float32 and rounded to the compute dtype. Where an int4 kernel is
in use, the difference is that of their roundings: torch's rounds offsets, that in chunks no weight at all.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench import DATA, RESULTS, environment, save, text_files

from awqkit import Recipe, RunOptions, quantize
from awqkit.api.device import choose_device
from awqkit.api.evaluate import score, text_windows
from awqkit.api.smollm2 import smollm2
from awqkit.checkpoint.reader import Checkpoint
from awqkit.evaluation.load import load_checkpoint
from awqkit.evaluation.packed_linear import PackedLinear
from awqkit.model.transformers_bridge import load_text_encoder
from awqkit.numerics.grid import dequantize

SEQ_LEN = 512


def main() -> None:
    """Compare in every dtype and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="loaded-cpu")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    files, device = text_files(args.data), choose_device(args.device)
    model = args.model or smollm2(args.gguf, emit=print)
    encoder = load_text_encoder(model)
    windows = text_windows((files["far"].read_text(encoding="utf-8"),), encoder, SEQ_LEN, args.windows, "far").used
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        recipe = Recipe.preset("fast", group_size=64, samples=args.samples, seq_len=SEQ_LEN)
        out = Path(scratch) / "out"
        quantize(model, out, recipe, calibration=files["calibration"], options=RunOptions(device=args.device))
        for name in args.dtypes:
            rows.append(_compare(out, getattr(torch, name), windows, len(encoder.start_tokens), device))
            print(rows[-1], flush=True)
    save(args.name, {"environment": environment(device), "model": model.name, "rows": rows}, args.results)


def _compare(
    folder: Path, dtype: torch.dtype, windows: torch.Tensor, start: int, device: torch.device
) -> dict[str, Any]:
    packed = load_checkpoint(Checkpoint.open(folder), dtype, device)
    kernels = sum(module.uses_kernel for module in packed.modules() if isinstance(module, PackedLinear))
    dense = _densely(folder, dtype, device)
    found = score(packed, windows, start, dense, device)
    twin = score(dense, windows, start, None, device)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "linears_on_the_int4_kernel": kernels,
        "perplexity_packed": found.perplexity,
        "perplexity_dense": twin.perplexity,
        "relative_difference": abs(found.perplexity / twin.perplexity - 1),
        "kl_dense_to_packed": found.kl,
    }


def _densely(folder: Path, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """The same model with dense linears; a float32 load never uses a kernel, so its codes can be read back."""
    model = load_checkpoint(Checkpoint.open(folder), torch.float32, device)
    for path, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            weight = module.quantized_weight()
            linear = torch.nn.Linear(
                module.in_features, module.out_features, bias=module.bias is not None, device=device
            )
            linear.weight.data = dequantize(weight.codes, weight.grid)
            if module.bias is not None:
                linear.bias.data = module.bias
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear)
    return model.to(dtype).eval()


if __name__ == "__main__":
    main()
