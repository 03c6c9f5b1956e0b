"""The Triton bodies of the two searches against the torch ones: on a GPU where there is one, else interpreted.

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

from awqkit.numerics.channel_scale import Candidate, rounding_errors
from awqkit.numerics.clip import RATIOS, search_clip
from awqkit.numerics.grid import split_groups

CASES = [(16, "moment", "", 3), (32, "variance", "symmetric", 4), (64, "moment", "half", 4), (32, "moment", "zeros", 4)]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton (Linux)"
)

_PROGRAM = """
import sys
sys.path[:0] = {path!r}
from test_group_search import compare
compare({group_size}, "{judge}", "{kind}", {bits}, "{device}")
"""
# of an error's size: products in TF32 on a GPU, sums in another order, and a step that lies within rounding of a tie
_TOLERANCE = 3e-3


def compare(group_size: int, judge: str, kind: str, bits: int, device: str) -> None:
    """Both bodies on one case, the torch ones on the CPU; raises AssertionError where they differ."""
    from awqkit.kernels import group_search

    generator = torch.Generator().manual_seed(group_size)
    rows, groups = 75, 3
    weight = torch.randn(rows, groups * group_size, generator=generator)
    if kind == "zeros":
        weight[:, :group_size] = 0.0
        weight[5] = weight[5].abs()
    inputs = torch.randn(groups, group_size, 4 * group_size, generator=generator)
    weights = inputs @ inputs.transpose(1, 2) / group_size
    if judge == "variance":
        weights = weights.diagonal(dim1=1, dim2=2).contiguous()
    row_weight = torch.rand(rows, generator=generator)
    scales = torch.cat([torch.ones(1, weight.shape[1]), torch.rand(6, weight.shape[1], generator=generator) + 0.5])
    choices = {
        "bits": bits, "symmetric": kind == "symmetric",
        "stored_dtype": torch.float16 if kind == "half" else torch.bfloat16,
    }  # fmt: skip
    expected = rounding_errors(
        weight, weights, row_weight, [Candidate("given", 0.0, scale) for scale in scales],
        group_size=group_size, **choices,
    )  # fmt: skip
    found = group_search.scale_errors(
        weight.to(device), weights.to(device), row_weight.to(device), scales.to(device),
        group_size=group_size, **choices,
    ).cpu()  # fmt: skip
    assert torch.allclose(found, expected, rtol=_TOLERANCE), (found / expected - 1).abs().max()

    grouped = split_groups(weight, group_size)
    for separate in (False, True):
        ends = search_clip(grouped, weights, separate_ends=separate, **choices)
        ends_found = group_search.clip_ratios(
            grouped.to(device), weights.to(device), RATIOS, separate_ends=separate, **choices
        )
        errors = [_errors(grouped, weights, *each, **choices) for each in (ends, [end.cpu() for end in ends_found])]
        # another ratio may be as good to within the tolerance; what counts is the error that it leaves
        assert torch.allclose(errors[1], errors[0], rtol=10 * _TOLERANCE, atol=1e-6 * float(errors[0].max()))
        assert float(torch.stack([a != b.cpu() for a, b in zip(ends, ends_found, strict=True)]).float().mean()) < 0.05


def _errors(grouped, weights, ratio_low, ratio_high, *, bits, symmetric, stored_dtype):  # type: ignore[no-untyped-def]
    from awqkit.numerics.grid import choose_scale_and_zero, group_range

    low, high = group_range(grouped)
    scale, zero = choose_scale_and_zero(
        low * ratio_low, high * ratio_high, bits=bits, symmetric=symmetric, stored_dtype=stored_dtype
    )
    scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
    error = grouped - (((grouped / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale
    blocks = torch.diag_embed(weights) if weights.dim() == 2 else weights
    return torch.einsum("gri,gij,grj->gr", error, blocks, error)


@needs_triton
@pytest.mark.parametrize(("group_size", "judge", "kind", "bits"), CASES)
def test_triton_bodies_are_the_torch_ones(group_size: int, judge: str, kind: str, bits: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    program = _PROGRAM.format(path=sys.path, group_size=group_size, judge=judge, kind=kind, bits=bits, device=device)
    variables = dict(os.environ) if device == "cuda" else {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
