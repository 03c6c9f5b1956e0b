"""A packed linear against the weight that its codes mean."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from awqkit.evaluation.packed_linear import PackedLinear
from awqkit.kernels.int4_matmul import CHUNKS
from awqkit.numerics.grid import QuantizedWeight, dequantize
from awqkit.numerics.rounding import round_nearest, span_grid


def _quantized(bits: int = 4, symmetric: bool = False) -> QuantizedWeight:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    grid = span_grid(weight, bits=bits, group_size=32, symmetric=symmetric, stored_dtype=torch.bfloat16)
    return round_nearest(weight, grid)


BIAS = torch.linspace(-2.0, 2.0, 32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bias", [None, BIAS])
def test_in_float32_it_is_the_dequantized_weight_bit_for_bit(bits: int, symmetric: bool, bias: Tensor | None) -> None:
    weight = _quantized(bits, symmetric)
    linear = PackedLinear(weight, bias, torch.float32)
    x = torch.randn(2, 7, 64)
    expected = F.linear(x, dequantize(weight.codes, weight.grid))
    assert not linear.uses_kernel
    assert torch.equal(linear(x), expected if bias is None else expected + bias)


def test_codes_and_grid_come_back_as_they_were() -> None:
    weight = _quantized()
    found = PackedLinear(weight, None, torch.float32).quantized_weight()
    assert torch.equal(found.codes, weight.codes)
    assert torch.equal(found.grid.group_scale, weight.grid.group_scale)
    assert torch.equal(found.grid.group_zero, weight.grid.group_zero)
    assert (found.grid.bits, found.grid.group_size, found.grid.symmetric) == (4, 32, False)


def test_two_codes_share_a_byte() -> None:
    linear = PackedLinear(_quantized(), None, torch.float32)
    largest = max(buffer.numel() * buffer.element_size() for buffer in linear.buffers())
    assert largest == 32 * 64 // 2
    assert not list(linear.parameters())


@pytest.mark.parametrize(("bits", "columns"), [(8, 64), (3, 63)])
def test_wide_codes_and_odd_rows_take_a_byte_each(bits: int, columns: int) -> None:
    weight = torch.randn(32, columns, generator=torch.Generator().manual_seed(0))
    grid = span_grid(weight, bits=bits, group_size=columns, symmetric=False, stored_dtype=torch.bfloat16)
    quantized = round_nearest(weight, grid)
    linear = PackedLinear(quantized, None, torch.float32)
    assert max(buffer.numel() * buffer.element_size() for buffer in linear.buffers()) == 32 * columns
    assert torch.equal(linear(torch.eye(columns)).t(), dequantize(quantized.codes, grid))
    quantized.codes.zero_()
    assert linear.quantized_weight().codes.any()


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_the_int4_kernel_is_for_4_bits_only(bits: int) -> None:
    assert not PackedLinear(_quantized(bits), None, torch.bfloat16).uses_kernel


@pytest.mark.parametrize("bias", [None, BIAS])
def test_in_bfloat16_the_kernel_computes_the_same_within_its_rounding(bias: Tensor | None) -> None:
    weight = _quantized()
    linear = PackedLinear(weight, bias, torch.bfloat16)
    x = torch.randn(3, 20, 64, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    found = linear(x)
    assert linear.uses_kernel
    assert found.dtype == torch.bfloat16
    exact = x.double() @ dequantize(weight.codes, weight.grid).double().t()
    exact = exact if bias is None else exact + bias.to(torch.bfloat16).double()
    assert float((found.double() - exact).norm() / exact.norm()) < 5e-3


def test_in_float16_it_is_dequantized() -> None:
    weight = _quantized()
    linear = PackedLinear(weight, BIAS, torch.float16)
    x = torch.randn(5, 64).to(torch.float16)
    assert not linear.uses_kernel
    expected = F.linear(x, dequantize(weight.codes, weight.grid).to(torch.float16), BIAS.to(torch.float16))
    assert torch.equal(linear(x), expected)


def test_the_weight_given_is_not_shared_with_the_layer() -> None:
    weight = _quantized()
    linear = PackedLinear(weight, None, torch.float32)
    before = linear.quantized_weight().codes.clone()
    weight.codes.zero_()
    assert torch.equal(linear.quantized_weight().codes, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [None, BIAS])
def test_chunks_hold_the_same_weight_and_give_it_back(dtype: torch.dtype, bias: Tensor | None) -> None:
    weight = _quantized()
    linear = PackedLinear(weight, bias, dtype, kernel=CHUNKS)
    x = torch.randn(3, 20, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    exact = x.double() @ dequantize(weight.codes, weight.grid).double().t()
    exact = exact if bias is None else exact + bias.to(dtype).double()
    assert float((linear(x).double() - exact).norm() / exact.norm()) < 5e-3
    assert torch.equal(linear.weight, dequantize(weight.codes, weight.grid).to(dtype))
    found = linear.quantized_weight()
    assert torch.equal(found.codes, weight.codes)
    assert torch.equal(found.grid.group_scale, weight.grid.group_scale)
    assert torch.equal(found.grid.group_zero, weight.grid.group_zero)


def test_chunks_let_a_gradient_through() -> None:
    weight = _quantized()
    linear = PackedLinear(weight, None, torch.bfloat16, kernel=CHUNKS)
    x = torch.randn(2, 64).to(torch.bfloat16).requires_grad_()
    linear(x).sum().backward()
    dense = dequantize(weight.codes, weight.grid).to(torch.bfloat16)
    torch.testing.assert_close(x.grad, dense.sum(dim=0).expand(2, -1), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kernel", [CHUNKS, None])
def test_a_packed_linear_can_be_compiled_whole(kernel: str | None) -> None:
    linear = PackedLinear(_quantized(), BIAS, torch.bfloat16, kernel=kernel)
    x = torch.randn(1, 64).to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(torch.compile(linear, backend="eager", fullgraph=True)(x), linear(x))
