"""torch's int4 kernel and its reference against products in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from awqkit.kernels.int4_matmul import dequantize_matmul, int4_matmul, kernel_takes, pack_for_kernel
from awqkit.numerics.grid import Grid, QuantizedWeight, dequantize
from awqkit.numerics.rounding import round_nearest, span_grid

CPU = torch.device("cpu")


def _quantized(
    rows: int, columns: int, group_size: int, *, symmetric: bool = False, shift: float = 0.0
) -> QuantizedWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) / columns**0.5 + shift
    return round_nearest(
        weight,
        span_grid(weight, bits=4, group_size=group_size, symmetric=symmetric, stored_dtype=torch.bfloat16),
    )


def _parts(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor, int]:
    grid: Grid = weight.grid
    return weight.codes, grid.group_scale, grid.group_zero, grid.group_size


def _inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("dtype", "out_features", "in_features", "group_size", "takes"),
    [
        (torch.bfloat16, 64, 128, 32, True),
        (torch.bfloat16, 64, 128, 128, True),
        (torch.float32, 64, 128, 32, False),  # exactness is what float32 is asked for
        (torch.float16, 64, 128, 32, False),
        (torch.bfloat16, 64, 128, 16, False),
        (torch.bfloat16, 72, 128, 32, False),
        (torch.bfloat16, 64, 100, 32, False),
    ],
)
def test_the_kernel_is_used_only_where_it_fits(
    dtype: torch.dtype, out_features: int, in_features: int, group_size: int, takes: bool
) -> None:
    assert kernel_takes(CPU, dtype, out_features, in_features, group_size) == takes


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [16, 32, 128])
def test_the_reference_multiplies_with_exactly_the_dequantized_weight(group_size: int, symmetric: bool) -> None:
    weight, x = _quantized(24, 128, group_size, symmetric=symmetric), _inputs(2, 5, 128)
    assert torch.equal(dequantize_matmul(x, *_parts(weight)), F.linear(x, dequantize(weight.codes, weight.grid)))
    # the rows of the identity give the weight itself, bit for bit
    assert torch.equal(dequantize_matmul(torch.eye(128), *_parts(weight)).t(), dequantize(weight.codes, weight.grid))


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("symmetric", "shift"), [(False, 0.0), (True, 0.0), (False, 0.2)])
def test_the_kernel_errs_no_more_than_a_dense_bfloat16_product(group_size: int, symmetric: bool, shift: float) -> None:
    """The offset that it holds in bfloat16 is part of its error, most of all where weights lie far from 0 (shift)."""
    weight = _quantized(64, 256, group_size, symmetric=symmetric, shift=shift)
    x = _inputs(40, 256).to(torch.bfloat16)
    exact = x.double() @ dequantize(weight.codes, weight.grid).double().t()
    kernel = int4_matmul(x, pack_for_kernel(*_parts(weight)))
    dense = F.linear(x, dequantize(weight.codes, weight.grid).to(torch.bfloat16))
    assert kernel.dtype == torch.bfloat16
    errors = [float((product.double() - exact).norm() / exact.norm()) for product in (kernel, dense)]
    assert errors[0] < 1.2 * errors[1] + 1e-4
    assert errors[0] < 5e-3


def test_the_kernel_keeps_leading_dimensions() -> None:
    weight, x = _quantized(32, 64, 32), _inputs(2, 3, 64).to(torch.bfloat16)
    packed = pack_for_kernel(*_parts(weight))
    product = int4_matmul(x, packed)
    assert product.shape == (2, 3, 32)
    assert torch.equal(product[1, 2], int4_matmul(x[1, 2], packed))
