"""Milliseconds a token of a 4-bit model beside the bfloat16 one, batch by batch: eager, and as a CUDA graph.

    python benchmarks/decode.py --device cuda

Weights are random and made on the device, at the shape of Llama-2-7B unless said; embeddings and head stay bfloat16.
Every variant decodes one token a step with transformers' static cache, by the same code (`token_steps.py`). A variant
that fails leaves a row that says why, and the JSON is written after every row.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import RESULTS, environment, save, write
from decoder_model import (
    CHUNKS_APART,
    DENSE,
    SHAPES,
    Shape,
    build,
    bytes_a_token,
    fitting_group_size,
    free,
    weight_bytes,
)
from product_times import product_rows, tile_rows
from token_steps import Decoding, greedy, seconds_a_step

from awqkit.api.device import choose_device
from awqkit.kernels.int4_matmul import CHUNKS, TILES

_EAGER_TOKENS, _CHECKED_TOKENS = 12, 8
_SPARE = 64  # positions of the cache behind the context and the tokens that are timed, and what lengths are rounded to


def main() -> None:
    """Measure what was asked for and write the JSON."""
    args = _arguments()
    device, started = choose_device(args.device), time.perf_counter()
    shape = SHAPES[args.shape].resized(args.layers, args.hidden)
    group_size = fitting_group_size(shape, args.group_size)
    result: dict[str, Any] = {
        "environment": environment(device),
        "shape": {"name": args.shape, **{name: getattr(shape, name) for name in Shape.__slots__}},
        "group_size": group_size,
        "context": args.context,
        "tokens": args.tokens,
        "products": [],
        "models": [],
        "tiles": [],
    }

    def keep(part: str, row: dict[str, Any]) -> None:
        result[part].append(row)
        write(args.name, result, args.results)
        print(f"{time.perf_counter() - started:6.1f} s  {part}: {_line(row)}", flush=True)

    measured = list(dict.fromkeys([*shape.linears(), *shape.joined_linears()]))
    if "products" in args.parts:
        _attempt(keep, "products", product_rows(measured, args.batches, group_size, device))
        free(device)
    if "models" in args.parts:
        for kind in args.kinds:
            _measure_model(args, shape, group_size, device, kind, result["models"], keep)
    if "tiles" in args.parts:
        _attempt(keep, "tiles", tile_rows(measured, args.batches, group_size, device))
    save(args.name, result, args.results)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-2-7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--hidden", type=int, help="the rest of the shape in proportion")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64, help="steps that are timed")
    parser.add_argument("--context", type=int, default=128, help="tokens in the cache when decoding starts")
    kinds = [DENSE, TILES, CHUNKS]
    parser.add_argument("--kinds", nargs="+", choices=[*kinds, CHUNKS_APART], default=kinds)
    parser.add_argument("--parts", nargs="+", choices=["products", "models", "tiles"], default=["products", "models"])
    parser.add_argument("--compile", type=int, nargs="*", default=[], help="batches to measure compiled as well")
    parser.add_argument("--no-eager", action="store_true", help="do not time eager steps")
    parser.add_argument("--name", default="decode")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def _attempt(keep: Callable[[str, dict[str, Any]], None], part: str, rows: Any) -> None:
    try:
        for row in rows:
            keep(part, row)
    except Exception as error:
        keep(part, {"failed": _reason(error)})


def _measure_model(
    args: argparse.Namespace,
    shape: Shape,
    group_size: int,
    device: torch.device,
    kind: str,
    rows: list[dict[str, Any]],
    keep: Callable[[str, dict[str, Any]], None],
) -> None:
    """Rows of one kind of model: every batch eager and as a graph, then what is compiled, which takes longest."""
    length = -(-(args.context + args.tokens + _SPARE) // _SPARE) * _SPARE
    free(device)
    try:
        model = build(shape, kind, torch.bfloat16, group_size, length, device)
    except Exception as error:
        keep("models", {"kind": kind, "failed": _reason(error)})
        return
    free(device)  # what building took is not part of what decoding takes
    held = {"weights_gb": weight_bytes(model) / 1e9, "read_a_token_gb": bytes_a_token(model) / 1e9}
    variants = [(batch, False) for batch in args.batches] + [(batch, True) for batch in args.compile]
    for batch, compiled in variants:
        row = {"kind": kind, "batch": batch, "compiled": compiled, **held}
        try:
            measured = _decode(model, batch, length, compiled, device, args)
            dense = _same(rows, DENSE, batch, compiled)
            for how in ("eager", "graph"):
                if dense and f"{how}_ms" in measured and f"{how}_ms" in dense:
                    measured[f"{how}_speedup"] = dense[f"{how}_ms"] / measured[f"{how}_ms"]
            keep("models", row | measured)
        except Exception as error:
            traceback.print_exc()
            keep("models", row | {"failed": _reason(error)})
        torch.compiler.reset()
        free(device)


def _decode(
    model: Any, batch: int, length: int, compiled: bool, device: torch.device, args: argparse.Namespace
) -> dict[str, Any]:
    decoding = Decoding(model, batch, args.context, length, compiled=compiled)
    measured: dict[str, Any] = {}
    if compiled:  # not a part of what is timed
        start = time.perf_counter()
        greedy(decoding, decoding.step, 1)
        measured["compile_s"] = time.perf_counter() - start
    if not args.no_eager or device.type == "cpu":
        seconds = seconds_a_step(decoding, decoding.step, min(args.tokens, _EAGER_TOKENS))
        measured |= {"eager_ms": seconds * 1e3, "eager_tokens_per_s": batch / seconds}
    if device.type == "cuda":
        replay = decoding.captured()
        seconds = seconds_a_step(decoding, replay, args.tokens)
        measured |= {"graph_ms": seconds * 1e3, "graph_tokens_per_s": batch / seconds}
        measured["graph_gb_per_s"] = bytes_a_token(model) / seconds / 1e9
        tokens, logits = greedy(decoding, replay, _CHECKED_TOKENS)
        plain_tokens, plain = greedy(decoding, decoding.step, _CHECKED_TOKENS)
        measured["same_tokens_as_eager"] = bool(torch.equal(tokens, plain_tokens))
        measured["largest_difference_of_first_logits"] = float((logits[0] - plain[0]).abs().max())
        measured["largest_logit"] = float(plain[0].abs().max())
        measured["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return measured


def _same(rows: list[dict[str, Any]], kind: str, batch: int, compiled: bool) -> dict[str, Any] | None:
    """The row of another kind of model under the same conditions."""
    found = [row for row in rows if (row["kind"], row.get("batch"), row.get("compiled")) == (kind, batch, compiled)]
    return found[-1] if found else None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:400]


def _line(row: dict[str, Any]) -> str:
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
    )


if __name__ == "__main__":
    main()
