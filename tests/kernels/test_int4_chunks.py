"""The chunked int4 layout and its bodies against products in float64: on a GPU where there is one, else interpreted.

The interpreter is chosen by an environment variable that is read when triton is imported: it has a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from awqkit.kernels import int4_chunks
from awqkit.kernels.int4_chunks import (
    PackedChunks,
    can_be_joined,
    chunks_fit,
    chunks_matmul,
    dequantize_chunks,
    joined_matmul,
    pack_chunks,
    unpack_codes,
)
from awqkit.numerics.grid import QuantizedWeight, dequantize
from awqkit.numerics.rounding import round_nearest, span_grid

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton (Linux)"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

# out, in, group size: usual; narrow groups; one scale per row; chunks that no split divides, features that no tile does
SHAPES = [(64, 512, 128), (48, 256, 32), (40, 64, 16), (32, 576, 576), (24, 1408, 128), (37, 384, 64), (16, 480, 96)]
ROWS = [1, 2, 8, 17, 33]
# of the norm of a product: one rounding of the result, and sums of products in float32 in any order
_ROUNDING = {torch.float16: 4e-4, torch.bfloat16: 3e-3}
# factors of x that one row is held to the same bound at; products stay normal numbers of the dtype
_SIZES = {torch.float16: (2.0**-6, 2.0**13), torch.bfloat16: (2.0**-40, 2.0**40)}

_PROGRAM = """
import sys
sys.path[:0] = {path!r}
import torch
from test_int4_chunks import SHAPES, compare, compare_joined
for shape in SHAPES:
    compare(*shape, "cpu", (torch.float16,))  # the interpreter holds no bfloat16
compare_joined("cpu", torch.float16)
"""


def quantized(
    rows: int, columns: int, group_size: int, *, symmetric: bool = False, dtype: torch.dtype = torch.bfloat16
) -> QuantizedWeight:
    """A rounded random weight, off zero so that zero points differ."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) / columns**0.5 + 0.01
    return round_nearest(
        weight, span_grid(weight, bits=4, group_size=group_size, symmetric=symmetric, stored_dtype=dtype)
    )


def packed(weight: QuantizedWeight) -> PackedChunks:
    """Its layout."""
    return pack_chunks(weight.codes, weight.grid.group_scale, weight.grid.group_zero, weight.grid.group_size)


def compare(out_features: int, in_features: int, group_size: int, device: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """The Triton bodies on one shape against float64; raises AssertionError where they differ."""
    from awqkit.kernels import int4_chunks_triton

    weight = quantized(out_features, in_features, group_size)
    exact = dequantize(weight.codes, weight.grid)
    parts = packed(weight)
    there = [part.to(device) for part in (parts.words, parts.scale, parts.zero)]
    assert torch.equal(int4_chunks_triton.dequantize(*there, torch.float32).cpu(), exact)
    for dtype in dtypes if can_be_joined(parts) else ():
        for rows in ROWS:
            x = inputs(rows, in_features).to(dtype)
            body = int4_chunks_triton.one_row if rows == 1 else int4_chunks_triton.few_rows
            found = body(x.to(device), *there)
            assert found.dtype == dtype
            assert found.shape == (rows, out_features)
            assert relative_error(found.cpu(), x, exact) < _ROUNDING[dtype], (rows, dtype)
        for size in _SIZES[dtype]:
            x = (inputs(1, in_features) * size).to(dtype)
            found = int4_chunks_triton.one_row(x.to(device), *there)
            assert relative_error(found.cpu(), x, exact) < _ROUNDING[dtype], (size, dtype)


def compare_joined(device: str, dtype: torch.dtype) -> None:
    """Several weights in one product, of sizes that no tile divides, against one weight of their rows."""
    from awqkit.kernels import int4_chunks_triton

    weight, bounds = packed(quantized(37 + 24 + 70, 384, 64)), [0, 37, 61, 131]
    there = [part.to(device) for part in (weight.words, weight.scale, weight.zero)]
    for rows in (2, 33):
        x = inputs(rows, 384).to(dtype).to(device)
        plain = int4_chunks_triton.few_rows(x, *there)
        ends = torch.tensor(bounds, dtype=torch.int32, device=device)
        found = int4_chunks_triton.few_rows(x, *there, bounds=ends).flatten()
        expected = [plain[:, first:end].flatten() for first, end in pairwise(bounds)]
        assert torch.equal(found, torch.cat(expected))


def inputs(*shape: int) -> Tensor:
    """Random inputs, the same ones each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def relative_error(product: Tensor, x: Tensor, weight: Tensor) -> float:
    """‖product − x Wᵀ‖ / ‖x Wᵀ‖."""
    exact = x.double() @ weight.double().t()
    return float((product.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("out_features", "in_features", "group_size"), SHAPES)
def test_the_layout_gives_codes_and_weight_back(out_features: int, in_features: int, group_size: int) -> None:
    weight = quantized(out_features, in_features, group_size)
    parts = packed(weight)
    assert parts.words.numel() * 8 == out_features * in_features
    assert torch.equal(unpack_codes(parts.words), weight.codes)
    found = dequantize_chunks(parts.words, parts.scale, parts.zero, torch.float32)
    assert torch.equal(found, dequantize(weight.codes, weight.grid))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_are_kept_exactly(dtype: torch.dtype) -> None:
    weight = quantized(64, 256, 32, dtype=dtype)
    parts = packed(weight)
    assert parts.scale.dtype == dtype
    assert torch.equal(parts.scale.float(), weight.grid.group_scale)


@pytest.mark.parametrize("dtype", list(_ROUNDING))
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_reference_rounds_only_its_result(dtype: torch.dtype, symmetric: bool) -> None:
    weight, x = quantized(48, 256, 64, symmetric=symmetric), inputs(2, 3, 256).to(dtype)
    found = chunks_matmul(x, packed(weight))
    assert found.shape == (2, 3, 48)
    assert found.dtype == dtype
    assert relative_error(found, x, dequantize(weight.codes, weight.grid)) < _ROUNDING[dtype]


@pytest.mark.parametrize(
    ("in_features", "group_size", "fits"),
    [
        (4096, 128, True),
        (4096, 16, True),
        (576, 576, True),
        (96, 48, True),
        (64, 8, False),
        (100, 100, False),
        (96, 64, False),
    ],
)
def test_groups_that_can_be_cut_into_chunks(in_features: int, group_size: int, fits: bool) -> None:
    assert chunks_fit(in_features, group_size) == fits


def test_the_operator_can_be_compiled_whole() -> None:
    parts, x = packed(quantized(32, 128, 32)), inputs(1, 128).to(torch.bfloat16)
    compiled = torch.compile(lambda x: chunks_matmul(x, parts) * 2, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), chunks_matmul(x, parts) * 2)
    arguments = (x, parts.words, parts.scale, parts.zero)
    torch.library.opcheck(torch.ops.awqkit.int4_chunks_matmul, arguments)
    torch.library.opcheck(torch.ops.awqkit.int4_chunks_joined, (*arguments, torch.tensor([0, 8, 32])))


@needs_triton
def test_triton_bodies_in_the_interpreter() -> None:
    program = _PROGRAM.format(path=sys.path)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_triton
@needs_cuda
@pytest.mark.parametrize(("out_features", "in_features", "group_size"), [*SHAPES, (4096, 4096, 128), (512, 11008, 32)])
def test_triton_bodies_on_a_gpu(out_features: int, in_features: int, group_size: int) -> None:
    compare(out_features, in_features, group_size, "cuda", tuple(_ROUNDING))


@needs_triton
@needs_cuda
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_joined_products_on_a_gpu(rows: int) -> None:
    weight, x = packed(quantized(192, 1024, 128)), inputs(rows, 1024).to(torch.bfloat16).cuda()
    there, bounds = PackedChunks(weight.words.cuda(), weight.scale.cuda(), weight.zero.cuda()), [0, 128, 160, 192]
    found = joined_matmul(x, there, torch.tensor(bounds, dtype=torch.int32, device="cuda"))
    plain = chunks_matmul(x, there)
    assert torch.equal(found, torch.cat([plain[:, first:end].flatten() for first, end in pairwise(bounds)]))
    compare_joined("cuda", torch.bfloat16)


@needs_triton
@needs_cuda
@pytest.mark.parametrize(
    ("rows", "group_size"), [(0, 128), (1, 128), (8, 128), (64, 128), (65, 128), (300, 128), (1, 16), (8, 16), (33, 16)]
)
def test_every_number_of_rows_on_a_gpu(rows: int, group_size: int) -> None:
    weight = quantized(256, 1024, group_size)
    parts = packed(weight)
    there = PackedChunks(parts.words.cuda(), parts.scale.cuda(), parts.zero.cuda())
    x = inputs(rows, 1024).to(torch.bfloat16)
    found = chunks_matmul(x.cuda(), there).cpu()
    assert found.shape == (rows, 256)
    if rows:  # from `_MOST_ROWS` on the weight is rounded too
        bound = 1.0 if rows <= int4_chunks._MOST_ROWS and can_be_joined(parts) else 2.0
        assert relative_error(found, x, dequantize(weight.codes, weight.grid)) < bound * _ROUNDING[torch.bfloat16]
