"""All blocks one after the other and back again, on a GPU as two CUDA graphs where that can be.

A step through a small model is thousands of kernels, which a GPU is done with sooner than Python has launched them. A
graph is launched as one. The head stays outside: it is run between the two, as the model itself runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from awqkit.errors import first_error, gist
from awqkit.kernels.capture import beside_usual_stream, captured, waiting_refused
from awqkit.model.block_calls import BlockCall, Carried
from awqkit.pipeline.tunable_block import TunableBlock


class BlocksPass:
    """The blocks' forward and backward pass over one batch after the other.

    recompute: as `TunableBlock` takes it. A pass that is replayed computes what it would if it were run.
    """

    def __init__(self, blocks: Sequence[TunableBlock], *, recompute: bool = False) -> None:
        self._blocks, self._recompute = blocks, recompute
        self._captured: _CapturedPass | None = None

    def capture(self, hidden: Tensor, calls: Sequence[BlockCall]) -> str | None:
        """Replay this batch's pass for every batch that is called like it, where it can be captured.

        It costs about two passes, and keeps what one keeps for its gradients. A model that cannot be captured, since it
        waits for the device, say, goes on as before, and why is returned.
        """
        if hidden.device.type != "cuda" or self._recompute:
            return None
        try:
            self._captured = _CapturedPass(self._blocks, hidden, calls)
        except Exception as error:  # whatever a model's own code does to break it
            torch.cuda.empty_cache()
            return gist(first_error(error))
        return None

    def forward(self, hidden: Tensor, calls: Sequence[BlockCall]) -> Tensor:
        """The last block's output, for `backward` where gradients are enabled; the next `forward` may overwrite it."""
        if self._captured is not None and self._captured.takes(hidden, calls):
            return self._captured.forward(hidden)
        return _through(self._blocks, hidden, calls, recompute=self._recompute and torch.is_grad_enabled())

    def backward(self, output: Tensor, gradient: Tensor) -> None:
        """Give the leaves of the blocks, which have none yet, their gradients. output: what `forward` gave last."""
        if self._captured is not None and output is self._captured.output:
            self._captured.backward(gradient)
        else:
            output.backward(gradient)


class _CapturedPass:
    """One batch's pass as two graphs, with buffers of their own for what goes in and comes out."""

    def __init__(self, blocks: Sequence[TunableBlock], hidden: Tensor, calls: Sequence[BlockCall]) -> None:
        self._calls, self._hidden = calls, hidden.clone()
        self._leaves = [leaf for block in blocks for leaf in block.leaves]
        with beside_usual_stream(hidden.device), torch.enable_grad():
            with waiting_refused():  # what waits for the device is found before a capture that it would break
                output = _through(blocks, self._hidden, calls)
                self._felt = torch.zeros_like(output)
                self._gradients(output)
            del output  # with the nodes of its graph, so that the capture has its own
            self._there, output = captured(partial(_through, blocks, self._hidden, calls))
            self._back, self._found = captured(partial(self._gradients, output), self._there.pool())
        self.output = output.detach()

    def _gradients(self, output: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(output, self._leaves, self._felt, allow_unused=True)

    def takes(self, hidden: Tensor, calls: Sequence[BlockCall]) -> bool:
        """Whether a batch differs from the captured one in its hidden states alone."""
        if hidden.shape != self._hidden.shape or hidden.dtype != self._hidden.dtype:
            return False
        return all(map(BlockCall.passes_the_same, calls, self._calls))

    def forward(self, hidden: Tensor) -> Tensor:
        self._hidden.copy_(hidden)
        self._there.replay()
        return self.output

    def backward(self, gradient: Tensor) -> None:
        self._felt.copy_(gradient)
        self._back.replay()
        for leaf, found in zip(self._leaves, self._found, strict=True):
            leaf.grad = found


def _through(
    blocks: Sequence[TunableBlock], hidden: Tensor, calls: Sequence[BlockCall], *, recompute: bool = False
) -> Tensor:
    beside: tuple[Carried, ...] = ()
    for block, call in zip(blocks, calls, strict=True):
        hidden, beside = block(hidden, call.given(beside), recompute=recompute)
    return hidden
