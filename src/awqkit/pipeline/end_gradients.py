"""Gradients of the model's own loss at every block's output: what an error there costs at the end.

One forward pass keeps every block's input, the output head gives the gradient at the last block's output, and one pass
over the blocks in reverse carries it to the first. The labels are drawn from the model itself, so that E[g gᵀ] is the
Fisher information (YAQA, Tseng 2025, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from awqkit.model.block_calls import Handed, hand_on, leaves, mapped
from awqkit.model.skeleton import Skeleton
from awqkit.numerics.draw import drawn_tokens
from awqkit.pipeline.activations import HiddenStates, TokenRows, usual_tokens_per_batch
from awqkit.pipeline.kept_states import KeptBeside, kept_states
from awqkit.pipeline.ranks import Ranks
from awqkit.pipeline.row_parts import OwnRows

BATCH_DIVISOR = 2  # a backward pass keeps what a forward pass drops
_LARGEST_TOKEN_WEIGHT = 20.0  # times the mean: beyond it a few tokens would be all that counts


class EndGradients:
    """`[rows, tokens, width]` bfloat16 for every block, and the gradients of what it hands on beside that.

    Of this rank's rows; token weights are relative to the mean over those of all ranks.
    """

    def __init__(self, gradients: list[Tensor], beside: Sequence[KeptBeside] = (), ranks: Ranks | None = None) -> None:
        self._gradients, self._beside, self._ranks = gradients, beside, ranks or Ranks.alone()

    def at(self, block: int) -> Tensor:
        """The gradient at the block's output for all rows, wherever it is kept."""
        return self._gradients[block]

    def beside(self, block: int, part: slice) -> list[Tensor]:
        """Of every float tensor that the block hands on beside its hidden states, for some rows."""
        return leaves(self._beside[block].at(part)) if block < len(self._beside) else []

    def token_weight(self, block: int) -> Tensor:
        """`[rows, tokens]` float32, mean 1: the root of each token's mean squared gradient, cut at 20 × the mean."""
        own = torch.stack([row.float().square().flatten(1).mean(dim=-1).sqrt() for row in self._gradients[block]])
        parts = self._ranks.everyones(own)
        weight = torch.cat([part.to(own.device) for part in parts])
        weight = weight / weight.mean().clamp(min=torch.finfo(torch.float32).tiny)
        weight = weight.clamp(max=_LARGEST_TOKEN_WEIGHT)
        weight = weight / weight.mean().clamp(min=torch.finfo(torch.float32).tiny)
        return weight.split([len(part) for part in parts])[self._ranks.rank]


def measure_end_gradients(
    skeleton: Skeleton,
    rows: TokenRows,
    device: torch.device,
    seed: int,
    step: Callable[[int], None],
    tokens_per_batch: int | None = None,
    own: OwnRows | None = None,
    ranks: Ranks | None = None,
) -> EndGradients:
    """The gradients of −log p(label) summed over all tokens.

    step(block): called after each block of both passes. tokens_per_batch: of a forward pass, None for as many as suit
    the device. own: which of all rows these are, as in `HiddenStates`.
    """
    tokens = max(1, (tokens_per_batch or usual_tokens_per_batch(device)) // BATCH_DIVISOR)
    states = HiddenStates(skeleton, rows, device, tokens_per_batch=tokens, own=own)
    *inputs, last = kept_states([states.shape] * (skeleton.num_blocks + 1), device)
    beside = [KeptBeside(len(rows.ids), device) for _ in inputs]
    for index in range(skeleton.num_blocks):
        block = skeleton.load_block(index, device)
        try:
            with torch.no_grad():
                for part, hidden, call, _ in states.batches(index):
                    inputs[index][part].copy_(hidden)
                    beside[index].keep(part, states.beside(part))
                    states.write(part, *hand_on(block, hidden, call))
        finally:
            skeleton.release_block(index)
        step(index)
    _at_last_output(skeleton, rows, states, device, seed)
    # a block's input is read once, so its gradient can take its place: [i] then holds that at block i − 1's output
    for part, gradient, _, _ in states.batches(0):
        last[part].copy_(gradient)
    felt = [KeptBeside(len(rows.ids), device) for _ in inputs]
    for index in reversed(range(1, skeleton.num_blocks)):  # nobody asks for the gradient before the first block
        block = skeleton.load_block(index, device)
        try:
            for position in range(states.num_batches):
                part, gradient, calls, _ = states.batch(position)
                hidden = inputs[index][part].to(device, torch.float32).requires_grad_(True)
                came_with = mapped(beside[index].at(part), _leaf)
                with torch.enable_grad():
                    handed = hand_on(block, hidden, calls[index].given(came_with))
                backward_from(handed, gradient, leaves(felt[index].at(part)))
                states.write(part, hidden.grad)
                inputs[index][part].copy_(hidden.grad)
                felt[index - 1].keep(part, tuple(_gradient(leaf) for leaf in _floats(came_with)))
        finally:
            skeleton.release_block(index)
        step(index)
    return EndGradients([*inputs[1:], last], felt, ranks)


def backward_from(handed: Handed, gradient: Tensor, beside: Sequence[Tensor]) -> None:
    """Backward from what a block gave. beside: the gradients of the float tensors among what it hands on."""
    outputs, gradients = [handed.hidden], [gradient]
    for output, felt in zip(_floats(handed.beside), beside, strict=True):
        if output.requires_grad:
            outputs.append(output)
            gradients.append(felt)
    torch.autograd.backward(outputs, gradients)


def _floats(carried: object) -> list[Tensor]:
    return [tensor for tensor in leaves(carried) if tensor.is_floating_point()]


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.is_floating_point())


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _at_last_output(skeleton: Skeleton, rows: TokenRows, states: HiddenStates, device: torch.device, seed: int) -> None:
    """Put the gradient at the last block's output in the place of that output."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(states.own.rows.start):  # every row gets the same numbers, whoever has it
        torch.rand(rows.ids.shape[1], 1, generator=generator)
    with skeleton.head(device) as head:
        for part, hidden, _, mask in states.batches(0):
            for row in range(len(hidden)):
                ids = rows.ids[part][row : row + 1].to(device)
                leaf = hidden[row : row + 1].clone().requires_grad_(True)
                row_mask = None if mask is None else mask[row : row + 1]
                with torch.enable_grad():
                    logits = head(ids, leaf, row_mask)[0]
                    chance = torch.rand(len(logits), 1, generator=generator).to(device)
                    labels = drawn_tokens(logits.detach(), chance)
                    chosen = logits.float().log_softmax(dim=-1).gather(-1, labels)
                    real = ... if mask is None else mask[row]
                    (-chosen[real]).sum().backward()
                hidden[row] = leaf.grad[0]
            states.write(part, hidden)
