"""The grid against brute force over every code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awqkit.numerics.grid import (
    Grid,
    choose_scale_and_zero,
    dequantize,
    group_range,
    merge_groups,
    nearest_codes,
    split_groups,
)
from awqkit.numerics.rounding import round_nearest, span_grid

GROUP = 8


def _weight(rows: int = 6, columns: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[:, 0] *= 9.0
    return weight


def _grid(weight: Tensor, bits: int = 4, symmetric: bool = False, dtype: torch.dtype = torch.bfloat16) -> Grid:
    return span_grid(weight, bits=bits, group_size=GROUP, symmetric=symmetric, stored_dtype=dtype)


def _nearest_by_brute_force(weight: Tensor, grid: Grid) -> Tensor:
    """The distance to the closest of all 2^bits grid values, float64 `[out, in]`."""
    scale = grid.group_scale.double().repeat_interleave(grid.group_size, dim=1)
    zero = grid.group_zero.double().repeat_interleave(grid.group_size, dim=1)
    codes = torch.arange(2**grid.bits, dtype=torch.float64)
    values = (codes - zero.unsqueeze(-1)) * scale.unsqueeze(-1)
    return (values - weight.double().unsqueeze(-1)).abs().amin(dim=-1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_group_far_from_zero_does_not_collapse(symmetric: bool, sign: float) -> None:
    weight = sign * torch.linspace(1.0, 2.0, GROUP).repeat(2, 1)
    found = round_nearest(weight, _grid(weight, symmetric=symmetric))
    assert len(found.codes[0].unique()) >= 4
    error = (dequantize(found.codes, found.grid) - weight).abs()
    # half a step inside the range; the top end may lie half a step off because Δ is rounded
    assert bool((error <= found.grid.group_scale * 1.01).all())


def test_the_range_always_contains_zero() -> None:
    low, high = group_range(torch.tensor([[1.0, 2.0], [-3.0, -1.0], [-1.0, 4.0], [0.0, 0.0]]))
    assert low.tolist() == [0.0, -3.0, -1.0, 0.0]
    assert high.tolist() == [2.0, 0.0, 4.0, 0.0]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_are_in_range_and_mean_the_nearest_grid_value(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    weight = _weight()
    found = round_nearest(weight, _grid(weight, bits, symmetric, dtype))
    assert found.codes.dtype == torch.uint8
    assert int(found.codes.max()) <= 2**bits - 1
    distance = (dequantize(found.codes, found.grid).double() - weight.double()).abs()
    torch.testing.assert_close(distance, _nearest_by_brute_force(weight, found.grid), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_an_asymmetric_grid_uses_its_whole_code_range(bits: int) -> None:
    weight = _weight()
    codes = nearest_codes(weight, _grid(weight, bits)).reshape(6, 3, GROUP)
    assert int(codes.amax(dim=-1).min()) >= 2**bits - 2  # rounding of Δ and z may cost one code
    assert int(codes.amin(dim=-1).max()) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_step_is_exact_in_the_stored_dtype_and_zero_a_whole_code(dtype: torch.dtype, symmetric: bool) -> None:
    grid = _grid(_weight(rows=64), symmetric=symmetric, dtype=dtype)
    assert torch.equal(grid.group_scale.to(dtype).float(), grid.group_scale)
    assert torch.equal(grid.group_zero, grid.group_zero.round())
    assert float(grid.group_zero.min()) >= 0
    assert float(grid.group_zero.max()) <= 15
    assert grid.group_scale.shape == (64, 3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_zero_is_the_middle_of_the_codes(bits: int) -> None:
    grid = _grid(_weight(), bits, symmetric=True)
    assert bool((grid.group_zero == 2 ** (bits - 1)).all())


def test_the_step_spans_the_range() -> None:
    low, high = torch.tensor([-1.0, -2.0]), torch.tensor([3.0, 0.0])
    scale, zero = choose_scale_and_zero(low, high, bits=4, symmetric=False, stored_dtype=torch.bfloat16)
    torch.testing.assert_close(scale, torch.tensor([4.0, 2.0]) / 15, rtol=2**-8, atol=0)
    assert zero.tolist() == [4.0, 15.0]
    scale, _ = choose_scale_and_zero(low, high, bits=4, symmetric=True, stored_dtype=torch.bfloat16)
    torch.testing.assert_close(scale, torch.tensor([6.0, 4.0]) / 15, rtol=2**-8, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_group_of_zeros_stays_zero_with_a_finite_step(symmetric: bool) -> None:
    weight = torch.zeros(2, GROUP)
    found = round_nearest(weight, _grid(weight, symmetric=symmetric))
    assert found.grid.group_scale.tolist() == [[1.0], [1.0]]
    assert torch.equal(dequantize(found.codes, found.grid), weight)


def test_a_step_that_underflows_in_float16_gives_zeros_not_nan() -> None:
    weight = torch.full((1, GROUP), 1e-9)
    weight[0, 0] = -1e-9
    found = round_nearest(weight, _grid(weight, dtype=torch.float16))
    assert float(found.grid.group_scale) == 1.0
    assert torch.equal(dequantize(found.codes, found.grid), torch.zeros(1, GROUP))
    # bfloat16 has the range, so nothing is lost there
    kept = round_nearest(weight, _grid(weight, dtype=torch.bfloat16))
    torch.testing.assert_close(dequantize(kept.codes, kept.grid), weight, rtol=0.1, atol=0)


def test_a_step_that_overflows_in_float16_is_the_largest_one() -> None:
    weight = torch.full((1, GROUP), 3e6)
    found = round_nearest(weight, _grid(weight, dtype=torch.float16))
    assert float(found.grid.group_scale) == torch.finfo(torch.float16).max
    assert bool(torch.isfinite(dequantize(found.codes, found.grid)).all())


def test_groups_split_and_merge() -> None:
    weight = _weight()
    grouped = split_groups(weight, GROUP)
    assert grouped.shape == (3, 6, GROUP)
    assert torch.equal(grouped[1], weight[:, GROUP : 2 * GROUP])
    assert torch.equal(merge_groups(grouped), weight)


def test_ratios_shrink_each_end_of_each_group() -> None:
    weight = _weight()
    whole = _grid(weight)
    half = torch.full((3, 6), 0.5)
    shrunk = span_grid(
        weight,
        bits=4,
        group_size=GROUP,
        symmetric=False,
        stored_dtype=torch.bfloat16,
        ratio_low=half,
        ratio_high=half,
    )
    torch.testing.assert_close(shrunk.group_scale, whole.group_scale / 2)
    one_row = torch.ones(3, 6)
    one_row[1, 4] = 0.5
    single = span_grid(
        weight,
        bits=4,
        group_size=GROUP,
        symmetric=False,
        stored_dtype=torch.bfloat16,
        ratio_low=one_row,
        ratio_high=one_row,
    )
    changed = (single.group_scale != whole.group_scale).nonzero().tolist()
    assert changed == [[4, 1]]
