"""The two searches that visit every weight a hundred times, on a GPU: nearest rounding under many scales, and clipping.

As torch operators each try is a dozen passes over the weight through memory. The Triton bodies (`group_search_triton`)
read a tile of rows of one group once and try everything on it in registers. Their references are what a CPU runs:
`numerics.channel_scale.rounding_errors` and `numerics.clip.search_clip`. Products with a group's block of H are in
TF32 on the tensor cores there: an error's share of the sum is off by 1e-3 at most, in no preferred direction.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

_GROUP_SIZES = (16, 32, 64, 128)
_STORED = (torch.bfloat16, torch.float16)


def takes(weight: Tensor, group_size: int, stored_dtype: torch.dtype) -> bool:
    """Whether the Triton bodies can be used for a weight on this device, in groups of this size."""
    there = weight.is_cuda and importlib.util.find_spec("triton") is not None
    return there and group_size in _GROUP_SIZES and stored_dtype in _STORED


def scale_errors(
    weight: Tensor,
    group_weights: Tensor,
    row_weight: Tensor,
    scales: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    stored_dtype: torch.dtype,
) -> Tensor:
    """Row-weighted errors `[candidates, groups]` float32 of nearest rounding under every s.

    weight: float32 `[out, in]`; group_weights: `[groups, group_size, group_size]` or `[groups, group_size]`, of the
    unscaled input; row_weight: `[out]`; scales: `[candidates, in]` float32.
    """
    return _triton().scale_errors(weight, group_weights, row_weight, scales, bits, group_size, symmetric, stored_dtype)


def clip_ratios(
    grouped: Tensor,
    group_weights: Tensor,
    ratios: Sequence[float],
    *,
    bits: int,
    symmetric: bool,
    stored_dtype: torch.dtype,
    separate_ends: bool,
) -> tuple[Tensor, Tensor]:
    """The best shares of the low and the high end, `[groups, out]` float32, of 1 and `ratios`.

    grouped: float32 `[groups, out, group_size]`; group_weights as for `scale_errors`, of the same (scaled) input.
    """
    sweeps = separate_ends and not symmetric
    return _triton().clip_ratios(grouped, group_weights, ratios, bits, symmetric, stored_dtype, sweeps)


@cache
def _triton() -> Any:
    from awqkit.kernels import group_search_triton

    return group_search_triton
