"""A W8A8 linear against the formula in float64."""

from __future__ import annotations

import pytest
import torch

from awqkit.evaluation.int8_linear import Int8Linear
from awqkit.kernels.int8_matmul import int8_matmul
from awqkit.numerics.activations import round_tokens
from awqkit.numerics.grid import QuantizedWeight, dequantize
from awqkit.numerics.rounding import round_nearest, span_grid


def weight_of(rows: int, columns: int, bits: int = 8, symmetric: bool = True) -> QuantizedWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    grid = span_grid(weight, bits=bits, group_size=columns, symmetric=symmetric, stored_dtype=torch.bfloat16)
    return round_nearest(weight, grid)


@pytest.mark.parametrize("columns", [1, 64, 1023, 1024, 5000])
def test_the_integer_product_is_exact(columns: int) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randint(-128, 128, (2, 3, columns), generator=generator)
    weight = torch.randint(-128, 128, (5, columns), generator=generator)
    inputs[0, 0], weight[0] = -128, -128  # the largest sum there is
    inputs[1] = torch.randint(115, 128, (3, columns), generator=generator)  # large sums that end in odd bits
    weight[1] = torch.randint(115, 128, (columns,), generator=generator)
    found = int8_matmul(inputs.float(), weight.to(torch.int8))
    assert found.dtype == torch.float64
    assert torch.equal(found.long(), inputs @ weight.t())


@pytest.mark.parametrize("bias", [False, True])
def test_it_multiplies_rounded_tokens_with_the_dequantized_weight(bias: bool) -> None:
    weight, offset = weight_of(24, 96), torch.linspace(-1.0, 1.0, 24)
    linear = Int8Linear(weight, offset if bias else None, torch.float32)
    x = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(2))
    x[..., 3] *= 40.0  # an outlier channel sets every token's step
    expected = round_tokens(x).double() @ dequantize(weight.codes, weight.grid).double().t()
    expected = expected + offset.double() if bias else expected
    assert float((linear(x).double() - expected).norm() / expected.norm()) < 1e-6
    exact = x.double() @ dequantize(weight.codes, weight.grid).double().t()
    assert float((linear(x).double() - exact).norm()) > 1e-3 * float(exact.norm())


def test_a_token_of_zeros_gives_the_bias() -> None:
    linear = Int8Linear(weight_of(8, 16), torch.arange(8.0), torch.bfloat16)
    found = linear(torch.zeros(3, 16, dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [list(range(8))] * 3


def test_codes_and_grid_come_back_as_they_were() -> None:
    weight = weight_of(8, 16)
    found = Int8Linear(weight, None, torch.float32).quantized_weight()
    assert torch.equal(found.codes, weight.codes) and found.codes.dtype == torch.uint8
    assert torch.equal(found.grid.group_scale, weight.grid.group_scale)
    assert torch.equal(found.grid.group_zero, weight.grid.group_zero)


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (8, False)])
def test_another_grid_is_refused(bits: int, symmetric: bool) -> None:
    with pytest.raises(ValueError, match="expected 8 bits"):
        Int8Linear(weight_of(8, 16, bits, symmetric), None, torch.float32)
