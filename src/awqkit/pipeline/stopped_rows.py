"""Rows of one stream on their way through a block that is quantized meanwhile, from one linear input to the next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from awqkit.methods.linear import QuantizedLinear
from awqkit.model.block_calls import BlockCall, Handed, hand_on
from awqkit.model.stopping_run import Finished, Stop, Stopped, StoppingRun
from awqkit.model.structure import LinearInput
from awqkit.pipeline.activations import HiddenStates
from awqkit.pipeline.context import BlockContext
from awqkit.pipeline.free_memory import is_spare
from awqkit.pipeline.quantized_block import weights_replaced

_SHARE = 0.3  # of the free memory that stopped rows may take

Reached = tuple[slice, Tensor, "Tensor | None"]


class StoppedRows:
    """The rows, stopped at a linear input. Where they do not fit in memory there, each way begins at the block's input.

    Either way they compute the same. To be closed.
    """

    def __init__(self, context: BlockContext, rows: HiddenStates, *, wait: bool | None = None) -> None:
        self._context, self._rows = context, rows
        self._wait = _fits(context, rows) if wait is None else wait
        self._quantized: dict[str, QuantizedLinear] = {}
        self._until: str | None = None
        self._runs: dict[int, StoppingRun] = {}

    @property
    def batch_bytes(self) -> float:
        """What a batch on its way takes of the device."""
        return float(self._rows.tokens_per_batch * self._context.memory.token)

    def at(self, entry: LinearInput, quantized: Mapping[str, QuantizedLinear]) -> Iterator[Reached]:
        """Row slice, the inputs there and the mask, batch by batch; all batches are to be taken.

        quantized: the linears before it, which the rows meet quantized.
        """
        order = [each.first for each in self._context.structure.inputs]
        passed = self._until is not None and order.index(entry.first) <= order.index(self._until)
        for part, reached, mask in self._go_on(entry.first, quantized, again=passed):
            if not isinstance(reached, Stopped):
                raise RuntimeError(f"a run of block {self._context.index} did not reach {entry.first}")
            yield part, reached.value, mask

    def finish(self, quantized: Mapping[str, QuantizedLinear]) -> None:
        """Move the rows on to the output of the block with these linears quantized."""
        for part, reached, _ in self._go_on(None, quantized, again=False):
            self._rows.write(part, *reached.value)

    def close(self) -> None:
        """Let go of what is stopped."""
        while self._runs:
            self._runs.popitem()[1].close()

    def _go_on(
        self, until: str | None, quantized: Mapping[str, QuantizedLinear], *, again: bool
    ) -> Iterator[tuple[slice, Stopped | Finished, Tensor | None]]:
        """again: whether the rows wait at that point or past it."""
        if again or any(quantized.get(name) is not met for name, met in self._quantized.items()):
            self.close()
        self._until = until
        self._quantized.clear()
        self._quantized.update(quantized)
        for part, hidden, call, mask in self._rows.batches(self._context.index):
            run = self._runs.pop(part.start, None) or self._run(hidden, call)
            self._runs[part.start] = run
            reached = run.resume()
            if not self._wait or isinstance(reached, Finished):
                self._runs.pop(part.start).close()
            yield part, reached, mask

    def _run(self, hidden: Tensor, call: BlockCall) -> StoppingRun:
        def body(stop: Stop) -> Handed:
            def before(name: str, inputs: Tensor) -> None:
                if name == self._until:
                    stop(inputs)

            with weights_replaced(self._context, self._quantized, before):
                return hand_on(self._context.block, hidden, call)

        return StoppingRun(body, hidden.device)


def _fits(context: BlockContext, rows: HiddenStates) -> bool:
    """Whether there is room for all rows between two linears: the residual and the widest input, float32."""
    memory = context.memory
    width = rows.shape[2:].numel() + max(entry.num_channels for entry in context.structure.inputs)
    reserved = memory.search + rows.tokens_per_batch * memory.token
    return is_spare(4.0 * rows.shape[:2].numel() * width, _SHARE, reserved, context.device)
