"""Tuning end to end: scales and folded gains moved so that the whole quantized model follows the original.

The loss is KL(original ‖ quantized) on the calibration rows. The original's last hidden states are there from the block
loop, so no second model runs; of the quantized one only codes, group scales and small vectors are kept. What a block
computes with is made when it computes, and made again for its gradient where not all of it fits into memory. Kept only
where held-out rows agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from awqkit.model.skeleton import Skeleton
from awqkit.numerics.divergence import kl_gradient, token_kl
from awqkit.pipeline.activations import HiddenStates, TokenRows
from awqkit.pipeline.captured_pass import BlocksPass
from awqkit.pipeline.free_memory import free_bytes
from awqkit.pipeline.tunable_block import TunableBlock, kept_bytes

_BETAS = (0.9, 0.95)
_WARM_UP = 0.05  # of all steps
_SHARE_OF_FREE = 0.5  # of the free memory, for what the gradients of a step need to have kept
_SHARE_CAPTURED = 0.25  # the same, where it stays there beside what other batches keep
_STEPS_WORTH_CAPTURING = 4
_NOT_CAPTURED = "tuning goes on without CUDA graphs, slower and with the same result: {}"
_LOGIT_BYTES = 256 << 20  # of the rows whose logits a GPU computes at once


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
    told: Callable[[str], None] = lambda text: None,
) -> tuple[float | None, float | None]:
    """Move the blocks' scales and gains; put them back where held-out rows got worse.

    epochs: passes over the calibration rows; half of one visits every second batch. step(done, total): called after
    each step. told: what is worth a line. Returns the mean KL on held-out rows before and after, None without any.
    """
    leaves = [leaf for block in blocks for leaf in block.leaves]
    optimizer = torch.optim.Adam(leaves, lr=stepping.learning_rate, betas=_BETAS)
    visits = _visits(calibration.first.num_batches, epochs, torch.Generator().manual_seed(seed))
    with skeleton.head(device) as logits:
        head = Head(logits, _rows_at_once(logits, calibration))
        share = _share_kept(blocks, calibration.first)
        run = BlocksPass(blocks, recompute=share > _SHARE_OF_FREE)
        before = None if held_out is None else _mean_kl(head, run, held_out)
        if share <= _SHARE_OF_FREE:
            for block in blocks:
                block.hold_weights()
        if share <= _SHARE_CAPTURED and len(visits) >= _STEPS_WORTH_CAPTURING:
            _, hidden, calls, _ = calibration.first.batch(0)
            reason = run.capture(hidden, calls)
            if reason is not None:
                told(_NOT_CAPTURED.format(reason))
        for done, position in enumerate(visits):
            for group in optimizer.param_groups:
                group["lr"] = stepping.learning_rate * _schedule(done, len(visits))
            _backward(head, run, calibration, position)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step(done + 1, len(visits))
        after = None if held_out is None else _mean_kl(head, run, replace(held_out, quantized=None))
    if before is not None and after is not None and not after < before:
        for leaf in leaves:
            leaf.data.zero_()
    return before, after


def _visits(num_batches: int, epochs: float, generator: torch.Generator) -> list[int]:
    """Which batches are stepped through: all in another order each time, then evenly spaced ones for what is left."""
    visits = [pos for _ in range(int(epochs)) for pos in torch.randperm(num_batches, generator=generator).tolist()]
    spaced = _spaced(num_batches, epochs)
    return visits + [spaced[index] for index in torch.randperm(len(spaced), generator=generator).tolist()]


def _spaced(num_batches: int, epochs: float) -> list[int]:
    """Which batches what is left of whole passes goes through."""
    whole = int(epochs)
    rest = max(round((epochs - whole) * num_batches), 1 - whole)
    return [index * num_batches // rest for index in range(rest)]


def visited(num_batches: int, epochs: float) -> set[int]:
    """Which of the calibration rows' batches `tune` looks at; the first is always one of them."""
    return set(range(num_batches) if epochs >= 1 else _spaced(num_batches, epochs))


def _share_kept(blocks: Sequence[TunableBlock], first: HiddenStates) -> float:
    """What all blocks keep for the gradients of one batch, as a share of what is free; without end where none tells."""
    free = free_bytes(first.device)
    if not free:
        return math.inf
    _, hidden, calls, _ = first.batch(0)
    return kept_bytes(blocks[0], hidden, calls[0]) * len(blocks) / free


def _schedule(done: int, total: int) -> float:
    """Linear warm-up, then a half cosine down to nothing."""
    return min(1.0, (done + 1) / max(1.0, _WARM_UP * total)) * 0.5 * (1.0 + math.cos(math.pi * done / total))


Logits = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


@dataclass(frozen=True, slots=True)
class Head:
    """What follows the last block: logits(ids, hidden, mask) of some rows, as `Skeleton.head` gives it."""

    logits: Logits
    rows_at_once: int = 1

    def pieces(self, num_rows: int) -> Iterator[slice]:
        """The rows of a batch as they are taken: logits are the largest tensors there are."""
        for start in range(0, num_rows, self.rows_at_once):
            yield slice(start, start + self.rows_at_once)


def _rows_at_once(logits: Logits, rows: TuningRows) -> int:
    """One on a CPU, which gains nothing by more; a GPU is done with one before the next is launched."""
    if rows.first.device.type == "cpu":
        return 1
    part, _, _, mask = rows.first.batch(0)
    goal, one = rows.last.rows_of(part)[:1], slice(0, 1)
    with torch.no_grad():
        row = logits(rows.rows.ids[part][one].to(goal.device), goal, None if mask is None else mask[one])
    return max(1, _LOGIT_BYTES // (4 * row.numel()))


def _backward(head: Head, run: BlocksPass, rows: TuningRows, position: int) -> None:
    """Give the leaves, which have none, the gradients of one batch's mean KL."""
    with torch.enable_grad():
        part, hidden, mask = _through(run, rows, position)
    goal = rows.last.rows_of(part)
    ids = rows.rows.ids[part].to(hidden.device)
    gradient = torch.empty_like(hidden)
    for some in head.pieces(len(hidden)):
        real = None if mask is None else mask[some]
        leaf = hidden[some].detach().requires_grad_(True)
        with torch.enable_grad():
            logits = head.logits(ids[some], leaf, real)
        with torch.no_grad():
            felt = kl_gradient(head.logits(ids[some], goal[some], real), logits)
            tokens = felt.shape[1] if real is None else real.sum(dim=1).reshape(-1, 1, 1)
            felt = felt / tokens if real is None else felt * (real.unsqueeze(-1) / tokens)
        logits.backward(felt.to(logits.dtype))
        gradient[some] = leaf.grad
    run.backward(hidden, gradient / len(hidden))


def _mean_kl(head: Head, run: BlocksPass, rows: TuningRows) -> float:
    total, tokens = 0.0, 0
    with torch.no_grad():
        for position in range(rows.first.num_batches):
            part, hidden, mask = _reached(run, rows, position)
            goal, ids = rows.last.rows_of(part), rows.rows.ids[part].to(hidden.device)
            for some in head.pieces(len(hidden)):
                found = _rows_kl(head, ids[some], goal[some], hidden[some], None if mask is None else mask[some])
                total, tokens = total + float(found.double().sum()), tokens + found.numel()
    return total / max(tokens, 1)


def _rows_kl(head: Head, ids: Tensor, goal: Tensor, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """KL of every real token of some rows, `[tokens]`."""
    expected = head.logits(ids, goal, mask)
    found = token_kl(expected, head.logits(ids, hidden, mask))
    return found.flatten() if mask is None else found[mask]


def _reached(run: BlocksPass, rows: TuningRows, position: int) -> tuple[slice, Tensor, Tensor | None]:
    """What `_through` gives, from the stream that has been there where there is one."""
    if rows.quantized is None:
        return _through(run, rows, position)
    part, _, _, mask = rows.first.batch(position)
    return part, rows.quantized.rows_of(part), mask


def _through(run: BlocksPass, rows: TuningRows, position: int) -> tuple[slice, Tensor, Tensor | None]:
    part, hidden, calls, mask = rows.first.batch(position)
    return part, run.forward(hidden, calls), mask
