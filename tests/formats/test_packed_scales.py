"""What tuning changes of a packed linear is written again alone: its group scales."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from awqkit.formats.awq import AwqFormat
from awqkit.formats.compressed_tensors import CompressedTensorsFormat
from awqkit.formats.format import Format
from awqkit.formats.scheme import Scheme
from awqkit.numerics.rounding import round_nearest, span_grid

COMPRESSED = [Scheme(bits, size, symmetric) for bits in (3, 4) for size in (16, -1) for symmetric in (False, True)]
CASES = [(CompressedTensorsFormat(), scheme) for scheme in (*COMPRESSED, Scheme(8, -1, True, "int8"))]


@pytest.mark.parametrize(
    ("written", "scheme"),
    [*CASES, (AwqFormat(), Scheme(4, 16, False))],
    ids=lambda given: getattr(given, "name", None) or str(given),
)
def test_other_scales_change_nothing_but_what_is_packed_of_scales(written: Format, scheme: Scheme) -> None:
    values = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    choices = {"bits": scheme.bits, "symmetric": scheme.symmetric, "stored_dtype": torch.bfloat16}
    weight = round_nearest(values, span_grid(values, group_size=scheme.columns(32), **choices))
    moved = replace(weight, grid=replace(weight.grid, group_scale=2 * weight.grid.group_scale))
    changed = written.pack_scales("m", moved, scheme, torch.bfloat16)
    tensors = written.pack("m", weight, scheme, torch.bfloat16) | changed
    assert list(changed) == ["m.scales" if isinstance(written, AwqFormat) else "m.weight_scale"]
    expected = written.pack("m", moved, scheme, torch.bfloat16)
    assert list(tensors) == list(expected)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
