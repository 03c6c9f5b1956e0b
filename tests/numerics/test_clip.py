"""Clip search against brute force over its ratios."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awqkit.numerics.clip import search_clip
from awqkit.numerics.grid import choose_scale_and_zero, group_range

RATIOS = [1.0 - 0.5 * step / 20 for step in range(21)]
GROUPS, ROWS, GROUP = 3, 11, 16


def _case(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    grouped = torch.randn(GROUPS, ROWS, GROUP, generator=generator)
    grouped[:, :, 0] *= 3.0  # an end that is worth clipping in some rows
    x = torch.randn(GROUPS, 64, GROUP, generator=generator) * torch.linspace(0.2, 2.0, GROUP)
    return grouped, x.transpose(1, 2) @ x / 64


def _error(
    grouped: Tensor, blocks: Tensor, low_ratio: Tensor, high_ratio: Tensor, bits: int = 4, symmetric: bool = False
) -> Tensor:
    """Each group's own error under the two ratios, float64 `[groups, out]`."""
    low, high = group_range(grouped)
    scale, zero = choose_scale_and_zero(
        low * low_ratio, high * high_ratio, bits=bits, symmetric=symmetric, stored_dtype=torch.bfloat16
    )
    scale, zero = scale.double().unsqueeze(-1), zero.double().unsqueeze(-1)
    codes = ((grouped.double() / scale).round() + zero).clamp(0, 2**bits - 1)
    error = grouped.double() - (codes - zero) * scale
    return torch.einsum("gri,gij,grj->gr", error, blocks.double(), error)


def _search(
    grouped: Tensor, blocks: Tensor, *, ends: bool, bits: int = 4, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    return search_clip(grouped, blocks, bits=bits, symmetric=symmetric, stored_dtype=torch.bfloat16, separate_ends=ends)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("ends", [False, True])
def test_no_group_of_any_row_gets_worse_than_without_clip(bits: int, symmetric: bool, ends: bool) -> None:
    grouped, blocks = _case()
    ratios = _search(grouped, blocks, ends=ends, bits=bits, symmetric=symmetric)
    ones = torch.ones(GROUPS, ROWS)
    clipped = _error(grouped, blocks, *ratios, bits, symmetric)
    whole = _error(grouped, blocks, ones, ones, bits, symmetric)
    assert bool((clipped <= whole * (1 + 1e-5)).all())
    assert float(clipped.sum()) < 0.95 * float(whole.sum())
    for ratio in ratios:
        assert float(ratio.min()) >= 0.5 - 1e-6
        assert float(ratio.max()) <= 1.0


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_shared_ratio_is_the_best_of_all_21(symmetric: bool) -> None:
    grouped, blocks = _case()
    low, high = _search(grouped, blocks, ends=False, bits=3, symmetric=symmetric)
    assert torch.equal(low, high)
    found = _error(grouped, blocks, low, high, 3, symmetric)
    tried = [torch.full((GROUPS, ROWS), ratio) for ratio in RATIOS]
    best = torch.stack([_error(grouped, blocks, ratio, ratio, 3, symmetric) for ratio in tried]).amin(dim=0)
    torch.testing.assert_close(found, best, rtol=1e-4, atol=0)


def test_separate_ends_are_never_worse_than_a_shared_ratio_and_mostly_better() -> None:
    grouped, blocks = _case()
    shared = _error(grouped, blocks, *_search(grouped, blocks, ends=False))
    ends = _error(grouped, blocks, *_search(grouped, blocks, ends=True))
    assert bool((ends <= shared * (1 + 1e-5)).all())
    assert float((ends < 0.999 * shared).float().mean()) > 0.5


def test_separate_ends_find_a_high_outlier_that_a_shared_ratio_cannot_drop() -> None:
    # A channel that is hardly used reaches up to 2, everything that matters lies in [-1, 1] and fills the low end:
    # only the high end should shrink.
    weights = torch.linspace(-1.0, 0.98, 64).reshape(1, 1, 64).clone()
    weights[..., -1] = 2.0
    usage = torch.ones(64)
    usage[-1] = 1e-6
    blocks = torch.diag(usage).unsqueeze(0)
    low, high = _search(weights, blocks, ends=True)
    assert float(high) <= 0.6
    assert float(low) >= 0.85
    shared = float(_error(weights, blocks, *_search(weights, blocks, ends=False)))
    assert float(_error(weights, blocks, low, high)) < 0.6 * shared


def test_a_symmetric_grid_has_one_ratio() -> None:
    grouped, blocks = _case()
    ends, shared = (_search(grouped, blocks, ends=ends, symmetric=True) for ends in (True, False))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], shared[0])


def test_zeros_and_unused_inputs_are_left_alone() -> None:
    grouped, blocks = _case()
    grouped[0] = 0.0
    blocks[1] = 0.0
    for ratio in _search(grouped, blocks, ends=True):
        assert torch.equal(ratio[:2], torch.ones(2, ROWS))
        assert bool((ratio[2] < 1).any())


def test_rows_do_not_depend_on_the_tile_that_they_are_searched_in() -> None:
    generator = torch.Generator().manual_seed(0)
    grouped = torch.randn(2, 4200, 32, generator=generator)  # more rows than one tile takes
    blocks = torch.eye(32).expand(2, 32, 32) * torch.linspace(0.1, 3.0, 32)
    whole = _search(grouped, blocks, ends=False)
    for part in (slice(0, 10), slice(4090, 4100), slice(4190, 4200)):
        alone = _search(grouped[:, part].contiguous(), blocks, ends=False)
        assert all(torch.equal(a[:, part], b) for a, b in zip(whole, alone, strict=True))
