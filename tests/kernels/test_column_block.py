"""The Triton bodies of the column loops against the torch ones: on a GPU where there is one, else interpreted.

The interpreter is chosen by an environment variable that is read when triton is imported, so each case runs in a
process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from awqkit.kernels import column_block

SHAPES = [(128, 50), (64, 16), (37, 20)]  # columns, rows: whole tiles, one tile, and neither a power of two

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton (Linux)"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

# float32 sums in another order: a step may differ where a value lies within rounding of a tie, and then moves what
# follows, so whole rows are compared. At most this share of them may differ.
_LARGEST_SHARE_OF_OTHER_ROWS = 0.05

_PROGRAM = """
import sys
sys.path[:0] = {path!r}
from test_column_block import compare
compare({columns}, {rows}, "{device}")
"""


def case(columns: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """weight, scale, lowest, highest `[columns, rows]`; U, the upper factor of H⁻¹, and H `[columns, columns]`."""
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(columns, rows, generator=generator)
    scale = torch.rand(columns, rows, generator=generator) * 0.2 + 0.1
    lowest = -torch.randint(4, 12, (columns, rows), generator=generator).float()
    inputs = torch.randn(columns, 4 * columns, generator=generator)
    moment = inputs @ inputs.t() / columns
    factor = torch.linalg.cholesky(torch.linalg.inv(moment), upper=True).contiguous()
    return weight, scale, lowest, lowest + 15, factor, moment


def compare(columns: int, rows: int, device: str) -> None:
    """Both bodies on one case, the torch ones on the CPU; raises AssertionError where they differ."""
    from awqkit.kernels import column_block_triton

    weight, scale, lowest, highest, factor, moment = case(columns, rows)

    def there(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.to(device) for tensor in tensors)

    expected = column_block.round_block(weight, scale, lowest, highest, factor)
    found = column_block_triton.round_block(*there(weight, scale, lowest, highest, factor))
    _assert_equal(found, expected)

    nearest = (weight / scale).round().clamp(min=lowest, max=highest)
    residual = moment @ (nearest * scale - weight)
    expected = column_block.descend_block(nearest, residual, scale, lowest, highest, moment)
    assert float(expected[1].ne(0).float().mean()) > 0.1  # from a start where there is something to do
    found = column_block_triton.descend_block(*there(nearest, residual, scale, lowest, highest, moment))
    _assert_equal(found, expected)


def _assert_equal(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    found = (found[0].cpu(), found[1].cpu())
    same = (found[0] == expected[0]).all(dim=0)
    assert float((~same).float().mean()) <= _LARGEST_SHARE_OF_OTHER_ROWS, f"{int((~same).sum())} rows differ"
    torch.testing.assert_close(found[1][:, same], expected[1][:, same], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("columns", "rows"), SHAPES)
def test_descent_starts_where_something_moves_and_lowers_the_objective(columns: int, rows: int) -> None:
    """The torch bodies are the reference, so they are held to the definition: each move lowers tr(E H Eᵀ)."""
    weight, scale, lowest, highest, _, moment = case(columns, rows)
    nearest = (weight / scale).round().clamp(min=lowest, max=highest)
    residual = moment @ (nearest * scale - weight)
    moved, changes = column_block.descend_block(nearest, residual, scale, lowest, highest, moment)
    torch.testing.assert_close(changes, (moved - nearest) * scale)
    assert bool(((moved >= lowest) & (moved <= highest)).all())
    before, after = ((each * scale - weight).double() for each in (nearest, moved))
    objectives = [float((error * (moment.double() @ error)).sum()) for error in (before, after)]
    assert objectives[1] < 0.9 * objectives[0]


@needs_triton
@pytest.mark.parametrize(("columns", "rows"), SHAPES)
def test_triton_bodies_in_the_interpreter(columns: int, rows: int) -> None:
    program = _PROGRAM.format(path=sys.path, columns=columns, rows=rows, device="cpu")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_triton
@needs_cuda
@pytest.mark.parametrize(("columns", "rows"), SHAPES)
def test_triton_bodies_on_a_gpu(columns: int, rows: int) -> None:
    compare(columns, rows, "cuda")
