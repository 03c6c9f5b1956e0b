"""The two loops over the columns of one lazy block: rounding with error feedback, and coordinate descent.

Column after column, so on a GPU a loop of torch operators is nothing but launches. The Triton bodies
(`column_block_triton`) keep a tile of rows in registers and walk all columns of the block in one launch; the torch
bodies here are the reference, and what a CPU runs. Tensors are transposed: `[columns, rows]`, a column is contiguous.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor


def round_block(
    weight: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """Steps q − z, and errors e = (w − ŵ) / U_jj, of the block's columns, each fed to the later ones.

    weight, scale, lowest, highest: float32 `[columns, rows]` (Δ and the range of steps for every weight); factor: the
    block of U `[columns, columns]`. Returns two tensors like `weight`.
    """
    if _on_gpu(weight):
        return _triton().round_block(weight, scale, lowest, highest, factor)
    remaining, steps, errors = weight.clone(), torch.empty_like(weight), torch.empty_like(weight)
    diagonal = factor.diagonal().tolist()
    for j, own in enumerate(diagonal):
        column = remaining[j]
        step = torch.div(column, scale[j], out=steps[j]).round_()
        torch.minimum(torch.maximum(step, lowest[j], out=step), highest[j], out=step)
        torch.addcmul(column, step, scale[j], value=-1.0, out=errors[j]).div_(own)
        remaining[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1.0)
    return steps, errors


def descend_block(
    steps: Tensor, residual: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor, moment: Tensor
) -> tuple[Tensor, Tensor]:
    """Steps after each column moved to the best grid value, and how far every weight moved.

    steps, scale, lowest, highest: float32 `[columns, rows]`; residual: (Ŵ − W)H of the block's columns; moment: the
    block of H `[columns, columns]`. Returns two tensors like `steps`.
    """
    if _on_gpu(steps):
        return _triton().descend_block(steps, residual, scale, lowest, highest, moment)
    local, moved, changes = residual.clone(), torch.empty_like(steps), torch.empty_like(steps)
    curvature = moment.diagonal().tolist()
    for j, own in enumerate(curvature):
        vertex = torch.addcdiv(steps[j], local[j], scale[j], value=-1.0 / own, out=moved[j]).round_()
        torch.minimum(torch.maximum(vertex, lowest[j], out=vertex), highest[j], out=vertex)
        torch.sub(vertex, steps[j], out=changes[j]).mul_(scale[j])
        local[j + 1 :].addr_(moment[j, j + 1 :], changes[j])
    return moved, changes


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda and importlib.util.find_spec("triton") is not None


@cache
def _triton() -> Any:
    from awqkit.kernels import column_block_triton

    return column_block_triton
