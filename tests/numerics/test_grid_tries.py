"""What a search sees on a tile against the codes themselves, and errors against sums in float64."""

from __future__ import annotations

import pytest
import torch

from awqkit.numerics.grid import Grid, dequantize, group_range, nearest_codes, split_groups
from awqkit.numerics.grid_tries import spanned, tile_error_, tile_of, tile_range, tile_row_errors_
from awqkit.numerics.tiles import group_tiles

GROUP = 8


def _weight(rows: int = 6, columns: int = 24) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    weight[:, 0] *= 9.0
    return weight


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_searches_see_the_error_of_the_codes(bits: int, symmetric: bool) -> None:
    weight = _weight()
    tile = tile_of(weight, GROUP, slice(0, 3), slice(0, 6))
    saved, (low, high) = tile.clone(), tile_range(tile)
    ratios = torch.tensor([1.0, 0.7]).reshape(2, 1, 1)
    tries = spanned(low * ratios, high * ratios, bits=bits, symmetric=symmetric, stored_dtype=torch.bfloat16)
    assert len(tries) == 2
    for each in tries:
        zero = torch.full_like(each.lowest, 2.0 ** (bits - 1)) if symmetric else -each.lowest
        grid = Grid(bits, GROUP, symmetric, each.group_scale[:, 0].t(), zero[:, 0].t())
        expected = weight - dequantize(nearest_codes(weight, grid), grid)
        found = tile_error_(tile, each, torch.empty_like(tile))
        torch.testing.assert_close(found.reshape(24, 6).t(), expected, rtol=0, atol=1e-6)
    assert torch.equal(tile, saved)


def test_a_tile_has_the_groups_and_rows_asked_for_and_their_range() -> None:
    weight = _weight()
    tile = tile_of(weight, GROUP, slice(1, 3), slice(2, 5))
    assert torch.equal(tile, split_groups(weight, GROUP)[1:3, 2:5].transpose(1, 2))
    assert tile.is_contiguous()
    for found, expected in zip(tile_range(tile), group_range(split_groups(weight, GROUP)), strict=True):
        assert torch.equal(found, expected[1:3, 2:5])


@pytest.mark.parametrize("diagonal", [False, True])
def test_row_errors_see_one_group_of_the_input_each(diagonal: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    error, x = torch.randn(3, GROUP, 5, generator=generator), torch.randn(3, 40, GROUP, generator=generator)
    blocks = x.transpose(1, 2) @ x
    weights = blocks.diagonal(dim1=1, dim2=2).contiguous() if diagonal else blocks
    expected = torch.zeros(3, 5, dtype=torch.float64)
    for group in range(3):
        whole = torch.diag(weights[group]) if diagonal else weights[group]
        for row in range(5):
            e = error[group, :, row].double()
            expected[group, row] = e @ whole.double() @ e
    out = torch.empty(2, 3, 5)
    tile_row_errors_(error, weights, torch.empty_like(error), out[1])
    torch.testing.assert_close(out[1].double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(1, 8, 1), (3, 8, 5000), (7, 4096, 100), (500, 64, 1500)])
def test_tiles_cover_every_group_and_row_once(shape: tuple[int, int, int]) -> None:
    groups, group_size, rows = shape
    seen = torch.zeros(groups, rows)
    for part in group_tiles(groups, group_size, rows, torch.device("cpu")):
        seen[part] += 1
    assert bool((seen == 1).all())
