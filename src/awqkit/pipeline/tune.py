"""Tuning end to end: group scales and folded gains moved so that the whole quantized model follows the original.

The loss is KL(original ‖ quantized) on the calibration rows. The original's last hidden states are there from the block
loop, so no second model runs; of the quantized one only codes, group scales and small vectors are in memory, a block's
weights are made when it computes and made again for its gradient. Kept only where held-out rows agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from awqkit.methods.tuning import TunableGain, TunableLinear
from awqkit.model.block_calls import BlockCall
from awqkit.model.skeleton import Skeleton
from awqkit.numerics.divergence import token_kl
from awqkit.numerics.grid import QuantizedWeight
from awqkit.pipeline.activations import HiddenStates, TokenRows

_LEARNING_RATE = 1e-3  # a factor of e^0.001 a step at most; 3e-3 was worse at 4 bits (docs/log.md)
_BETAS = (0.9, 0.95)
_WARM_UP = 0.05  # of all steps


@dataclass(frozen=True, slots=True)
class TunedBlock:
    """What came of one block: linear name -> codes on moved grids, parameter name -> moved gain."""

    quantized: Mapping[str, QuantizedWeight]
    stored: Mapping[str, Tensor]


class TunableBlock:
    """One block as it was quantized, with what may still move.

    module: the block, whose own parameters are not looked at. linears, gains: by parameter name. fixed: every other
    parameter and buffer by name, as stored.
    """

    def __init__(
        self,
        module: nn.Module,
        linears: Mapping[str, TunableLinear],
        gains: Mapping[str, TunableGain],
        fixed: Mapping[str, Tensor],
    ) -> None:
        self.module, self.linears, self.gains, self.fixed = module, linears, gains, fixed

    def __call__(self, hidden: Tensor, call: BlockCall) -> Tensor:
        """The block's output, differentiable in `hidden`, group scales and gains."""
        return checkpoint(self._run, hidden, call, use_reentrant=False)

    def _run(self, hidden: Tensor, call: BlockCall) -> Tensor:
        tensors = {
            **self.fixed,
            **{name: linear.weight() for name, linear in self.linears.items()},
            **{name: gain.vector() for name, gain in self.gains.items()},
        }
        outputs = functional_call(self.module, tensors, (hidden, *call.args), dict(call.kwargs))
        return outputs[0] if isinstance(outputs, (tuple, list)) else outputs

    @property
    def leaves(self) -> list[Tensor]:
        """Everything that a gradient step moves."""
        return [each.log_change for each in (*self.linears.values(), *self.gains.values())]


@dataclass(frozen=True, slots=True)
class TuningRows:
    """Rows with both ends of the original stream: the first block's input, and the last block's output."""

    rows: TokenRows
    first: HiddenStates
    last: HiddenStates


def tune(
    skeleton: Skeleton,
    blocks: Sequence[TunableBlock],
    calibration: TuningRows,
    held_out: TuningRows | None,
    *,
    epochs: int,
    seed: int,
    device: torch.device,
    step: Callable[[int, int], None],
) -> tuple[float | None, float | None]:
    """Move the blocks' scales and gains; put them back where held-out rows got worse.

    step(done, total): called after each step. Returns the mean KL on held-out rows before and after, None without any.
    """
    leaves = [leaf for block in blocks for leaf in block.leaves]
    optimizer = torch.optim.Adam(leaves, lr=_LEARNING_RATE, betas=_BETAS)
    generator = torch.Generator().manual_seed(seed)
    total = epochs * calibration.first.num_batches
    with skeleton.head(device) as head:
        before = None if held_out is None else _mean_kl(head, blocks, held_out)
        for done, position in enumerate(_visits(calibration.first.num_batches, epochs, generator)):
            for group in optimizer.param_groups:
                group["lr"] = _LEARNING_RATE * _schedule(done, total)
            _backward(head, blocks, calibration, position)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step(done + 1, total)
        after = None if held_out is None else _mean_kl(head, blocks, held_out)
    if before is not None and after is not None and not after < before:
        for leaf in leaves:
            leaf.data.zero_()
    return before, after


def _visits(num_batches: int, epochs: int, generator: torch.Generator) -> Iterator[int]:
    for _ in range(epochs):
        yield from torch.randperm(num_batches, generator=generator).tolist()


def _schedule(done: int, total: int) -> float:
    """Linear warm-up, then a half cosine down to nothing."""
    return min(1.0, (done + 1) / max(1.0, _WARM_UP * total)) * 0.5 * (1.0 + math.cos(math.pi * done / total))


Head = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _backward(head: Head, blocks: Sequence[TunableBlock], rows: TuningRows, position: int) -> None:
    """Add the gradients of one batch's mean KL to the leaves."""
    with torch.enable_grad():
        part, hidden, mask = _through(blocks, rows, position)
    goal = rows.last.rows_of(part)
    ids = rows.rows.ids[part].to(hidden.device)
    gradient = torch.empty_like(hidden)
    for row in range(len(hidden)):  # row by row: logits are the largest tensors there are
        leaf = hidden[row : row + 1].detach().requires_grad_(True)
        with torch.enable_grad():
            row_mask = None if mask is None else mask[row : row + 1]
            _row_kl(head, ids[row : row + 1], goal[row : row + 1], leaf, row_mask).mean().backward()
        gradient[row] = leaf.grad[0]
    hidden.backward(gradient / len(hidden))


def _mean_kl(head: Head, blocks: Sequence[TunableBlock], rows: TuningRows) -> float:
    total, tokens = 0.0, 0
    with torch.no_grad():
        for position in range(rows.first.num_batches):
            part, hidden, mask = _through(blocks, rows, position)
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


def _through(blocks: Sequence[TunableBlock], rows: TuningRows, position: int) -> tuple[slice, Tensor, Tensor | None]:
    part, hidden, calls, mask = rows.first.batch(position)
    for block, call in zip(blocks, calls, strict=True):
        hidden = block(hidden, call)
    return part, hidden, mask
