"""Tuning end to end: scales and folded gains moved so that the whole quantized model follows the original.

The loss is KL(original ‖ quantized) on the calibration rows. The original's last hidden states are there from the block
loop, so no second model runs; of the quantized one only codes, group scales and small vectors are kept. What a block
computes with is made when it computes, and made again for its gradient where not all of it fits into memory. Kept only
where held-out rows agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from awqkit.model.block_calls import Carried
from awqkit.model.skeleton import Skeleton
from awqkit.numerics.divergence import kl_gradient, token_kl
from awqkit.pipeline.activations import HiddenStates, TokenRows
from awqkit.pipeline.free_memory import free_bytes
from awqkit.pipeline.tunable_block import TunableBlock, kept_bytes

_BETAS = (0.9, 0.95)
_WARM_UP = 0.05  # of all steps
_SHARE_OF_FREE = 0.5  # of the free memory, for what the gradients of a step need to have kept


@dataclass(frozen=True, slots=True)
class Stepping:
    """tokens_per_step: of a step's rows. learning_rate: of log factors."""

    tokens_per_step: int
    learning_rate: float


STEPPING = {
    "groups": Stepping(4096, 1e-3),  # 3e-3 was worse at 4 bits (docs/log.md)
    "rows": Stepping(1024, 1e-3),
}


@dataclass(frozen=True, slots=True)
class TuningRows:
    """Rows with both ends of the original stream: the first block's input, and the last block's output.

    quantized: the last block's output as quantized so far, where a stream of it was run.
    """

    rows: TokenRows
    first: HiddenStates
    last: HiddenStates
    quantized: HiddenStates | None = None


def tune(
    skeleton: Skeleton,
    blocks: Sequence[TunableBlock],
    calibration: TuningRows,
    held_out: TuningRows | None,
    *,
    epochs: float,
    stepping: Stepping,
    seed: int,
    device: torch.device,
    step: Callable[[int, int], None],
) -> tuple[float | None, float | None]:
    """Move the blocks' scales and gains; put them back where held-out rows got worse.

    epochs: passes over the calibration rows; half of one visits every second batch. step(done, total): called after
    each step. Returns the mean KL on held-out rows before and after, None without any.
    """
    leaves = [leaf for block in blocks for leaf in block.leaves]
    optimizer = torch.optim.Adam(leaves, lr=stepping.learning_rate, betas=_BETAS)
    visits = _visits(calibration.first.num_batches, epochs, torch.Generator().manual_seed(seed))
    with skeleton.head(device) as head:
        before = None if held_out is None else _mean_kl(head, blocks, held_out)
        recompute = not _fits(blocks, calibration.first)
        if not recompute:
            for block in blocks:
                block.hold_weights()
        for done, position in enumerate(visits):
            for group in optimizer.param_groups:
                group["lr"] = stepping.learning_rate * _schedule(done, len(visits))
            _backward(head, blocks, calibration, position, recompute)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step(done + 1, len(visits))
        after = None if held_out is None else _mean_kl(head, blocks, replace(held_out, quantized=None))
    if before is not None and after is not None and not after < before:
        for leaf in leaves:
            leaf.data.zero_()
    return before, after


def _visits(num_batches: int, epochs: float, generator: torch.Generator) -> list[int]:
    """Which batches are stepped through: all in another order each time, then evenly spaced ones for what is left."""
    whole = int(epochs)
    rest = max(round((epochs - whole) * num_batches), 1 - whole)
    visits = [position for _ in range(whole) for position in torch.randperm(num_batches, generator=generator).tolist()]
    spaced = [index * num_batches // rest for index in range(rest)]
    return visits + [spaced[index] for index in torch.randperm(rest, generator=generator).tolist()]


def _fits(blocks: Sequence[TunableBlock], first: HiddenStates) -> bool:
    """Whether there is room for what all blocks keep for the gradients of one batch."""
    free = free_bytes(first.device)
    if free is None:
        return False
    _, hidden, calls, _ = first.batch(0)
    return kept_bytes(blocks[0], hidden, calls[0]) * len(blocks) <= _SHARE_OF_FREE * free


def _schedule(done: int, total: int) -> float:
    """Linear warm-up, then a half cosine down to nothing."""
    return min(1.0, (done + 1) / max(1.0, _WARM_UP * total)) * 0.5 * (1.0 + math.cos(math.pi * done / total))


Head = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _backward(head: Head, blocks: Sequence[TunableBlock], rows: TuningRows, position: int, recompute: bool) -> None:
    """Add the gradients of one batch's mean KL to the leaves."""
    with torch.enable_grad():
        part, hidden, mask = _through(blocks, rows, position, recompute)
    goal = rows.last.rows_of(part)
    ids = rows.rows.ids[part].to(hidden.device)
    gradient = torch.empty_like(hidden)
    for row in range(len(hidden)):  # row by row: logits are the largest tensors there are
        one = slice(row, row + 1)
        real = None if mask is None else mask[one]
        leaf = hidden[one].detach().requires_grad_(True)
        with torch.enable_grad():
            logits = head(ids[one], leaf, real)
        with torch.no_grad():
            felt = kl_gradient(head(ids[one], goal[one], real), logits)
            felt = felt / felt.shape[1] if real is None else felt * (real / real.sum()).unsqueeze(-1)
        logits.backward(felt.to(logits.dtype))
        gradient[one] = leaf.grad
    hidden.backward(gradient / len(hidden))


def _mean_kl(head: Head, blocks: Sequence[TunableBlock], rows: TuningRows) -> float:
    total, tokens = 0.0, 0
    with torch.no_grad():
        for position in range(rows.first.num_batches):
            part, hidden, mask = _reached(blocks, rows, position)
            goal, ids = rows.last.rows_of(part), rows.rows.ids[part].to(hidden.device)
            for row in range(len(hidden)):
                one = slice(row, row + 1)
                found = _row_kl(head, ids[one], goal[one], hidden[one], None if mask is None else mask[one])
                total, tokens = total + float(found.double().sum()), tokens + found.numel()
    return total / max(tokens, 1)


def _row_kl(head: Head, ids: Tensor, goal: Tensor, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """KL of every real token of one row, `[tokens]`."""
    with torch.no_grad():
        expected = head(ids, goal, mask)
    found = token_kl(expected, head(ids, hidden, mask))[0]
    return found if mask is None else found[mask[0]]


def _reached(blocks: Sequence[TunableBlock], rows: TuningRows, position: int) -> tuple[slice, Tensor, Tensor | None]:
    """What `_through` gives, from the stream that has been there where there is one."""
    if rows.quantized is None:
        return _through(blocks, rows, position, recompute=False)
    part, _, _, mask = rows.first.batch(position)
    return part, rows.quantized.rows_of(part), mask


def _through(
    blocks: Sequence[TunableBlock], rows: TuningRows, position: int, recompute: bool
) -> tuple[slice, Tensor, Tensor | None]:
    part, hidden, calls, mask = rows.first.batch(position)
    beside: tuple[Carried, ...] = ()
    for block, call in zip(blocks, calls, strict=True):
        hidden, beside = block(hidden, call.given(beside), recompute=recompute)
    return part, hidden, mask
