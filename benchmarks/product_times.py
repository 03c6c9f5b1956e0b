"""Microseconds of single products at a model's shapes, from memory and not from cache: each call has another weight."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from decoder_model import DENSE, random_weight, weight_bytes
from torch import Tensor

from awqkit.evaluation.packed_linear import PackedLinear
from awqkit.kernels.int4_matmul import CHUNKS, TILES
from awqkit.numerics.grid import dequantize

_BEYOND_CACHE = 400e6  # bytes of copies, several times what a GPU caches
_REPLAYS = 20
ONE_ROW_TILES = [(features, warps) for features in (4, 8, 16) for warps in (1, 2, 4, 8)]
FEW_ROWS_TILES = [
    (tile, programs) for tile in ((32, 4), (64, 4), (64, 2), (128, 4), (128, 8)) for programs in (256, 512)
]
FEW_ROWS_TILES += [((64, 4), 1024), ((128, 4), 1024)]

Product = Callable[[Tensor], Tensor]


def product_rows(
    shapes: list[tuple[int, int]], batches: list[int], group_size: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """A row per shape, batch and kernel: microseconds, GB/s of weights, relative error against float64."""
    for out_features, in_features in shapes:
        weight = random_weight(out_features, in_features, group_size, device)
        exact = dequantize(weight.codes, weight.grid)
        for kind in (DENSE, TILES, CHUNKS):
            row: dict[str, Any] = {"out": out_features, "in": in_features, "kernel": kind}
            try:
                if kind == DENSE:
                    rounded, num_bytes = exact.to(torch.bfloat16), exact.numel() * 2
                    products: list[Product] = [
                        partial(_dense, weight=rounded.clone()) for _ in range(_copies(num_bytes, device))
                    ]
                else:
                    first = PackedLinear(weight, None, torch.bfloat16, kernel=kind)
                    num_bytes = weight_bytes(first)
                    products = [deepcopy(first) for _ in range(_copies(num_bytes, device))]
                for batch in batches:
                    yield row | {"batch": batch} | _measured(products, num_bytes, batch, exact)
            except Exception as error:  # a kernel that fails costs its rows alone
                yield row | {"failed": f"{type(error).__name__}: {error}"[:300]}


def tile_rows(
    shapes: list[tuple[int, int]], batches: list[int], group_size: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """The same for every tile of the Triton bodies."""
    from awqkit.kernels import int4_chunks_triton as bodies

    for out_features, in_features in shapes:
        weight = random_weight(out_features, in_features, group_size, device)
        exact = dequantize(weight.codes, weight.grid)
        first = PackedLinear(weight, None, torch.bfloat16, kernel=CHUNKS)
        num_bytes = weight_bytes(first)
        linears = [deepcopy(first) for _ in range(_copies(num_bytes, device))]
        parts = [(linear.words, linear.scale, linear.zero) for linear in linears]
        for batch in batches:
            tiles = [(tile, 0) for tile in ONE_ROW_TILES] if batch == 1 else FEW_ROWS_TILES
            for tile, programs in tiles:
                row = {"out": out_features, "in": in_features, "batch": batch, "tile": tile, "programs": programs}
                chosen = {"tile": tile} if batch == 1 else {"tile": tile, "programs": programs}
                body = bodies.one_row if batch == 1 else bodies.few_rows
                products = [partial(_with_parts, body=body, parts=each, chosen=chosen) for each in parts]
                try:
                    yield row | _measured(products, num_bytes, batch, exact)
                except Exception as error:
                    yield row | {"failed": f"{type(error).__name__}: {error}"[:300]}


def _dense(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def _with_parts(x: Tensor, body: Callable[..., Tensor], parts: tuple[Tensor, ...], chosen: dict[str, Any]) -> Tensor:
    return body(x, *parts, **chosen)


def _copies(num_bytes: int, device: torch.device) -> int:
    return 2 if device.type == "cpu" else max(2, round(_BEYOND_CACHE / num_bytes))


def _measured(products: list[Any], num_bytes: int, batch: int, exact: Tensor) -> dict[str, Any]:
    x = torch.randn(batch, exact.shape[1], device=exact.device).to(torch.bfloat16)
    with torch.no_grad():
        found = products[0](x).double()
        reference = x.double() @ exact.double().t()
        error = float((found - reference).norm() / reference.norm())
        seconds = _seconds(products, x)
    return {"us": seconds * 1e6, "gb_per_s": num_bytes / seconds / 1e9, "relative_error": error}


def _seconds(products: list[Any], x: Tensor) -> float:
    """Mean seconds of a call, by a graph of one call with each weight where there are graphs."""
    if x.device.type == "cpu":
        start = time.perf_counter()
        for product in products:
            product(x)
        return (time.perf_counter() - start) / len(products)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for product in products[:2]:
            product(x)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in products:
            product(x)
    graph.replay()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(_REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / _REPLAYS / len(products)
