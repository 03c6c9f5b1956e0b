"""What the steps of one block share: values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from awqkit.model.matrices import matrix_of
from awqkit.model.skeleton import Skeleton
from awqkit.model.structure import BlockStructure, Fold
from awqkit.pipeline.across_blocks import AcrossBlocks
from awqkit.pipeline.activations import HiddenStates
from awqkit.pipeline.block_memory import BlockMemory, block_memory
from awqkit.pipeline.end_gradients import EndGradients
from awqkit.pipeline.plan import BlockPlan, RunPlan
from awqkit.pipeline.ranks import Ranks
from awqkit.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Stream:
    """Hidden states of some rows on the original stream and, with propagation, on the quantized one."""

    original: HiddenStates
    quantized: HiddenStates | None = None


@dataclass(frozen=True, slots=True)
class Streams:
    """The hidden states that a run carries from block to block.

    calibration: this rank's rows for the statistics. probe: the first two of all, for the row weights. held_out: this
    rank's rows for the check, or None. gradients: of the end loss at every block's output, for the calibration rows,
    or None. weights: `[rows, tokens]`, what their tokens count in statistics, or None where all count 1.
    """

    calibration: Stream
    probe: HiddenStates
    held_out: Stream | None
    gradients: EndGradients | None = None
    weights: Tensor | None = None

    @property
    def named(self) -> dict[str, HiddenStates]:
        """All that moves from block to block."""
        found = {"calibration": self.calibration.original, "probe": self.probe}
        if self.calibration.quantized is not None:
            found["calibration quantized"] = self.calibration.quantized
        if self.held_out is not None:
            found["held out"] = self.held_out.original
            if self.held_out.quantized is not None:
                found["held out quantized"] = self.held_out.quantized
        return found

    def token_weight(self, block: int) -> Tensor | None:
        """`[rows, tokens]`, what an error at each calibration token costs in a block; None where all cost the same."""
        felt = None if self.gradients is None else self.gradients.token_weight(block)
        if felt is None or self.weights is None:
            return self.weights if felt is None else felt
        return felt * self.weights.to(felt.device)


@dataclass(frozen=True, slots=True)
class BlockContext:
    """One block with its weights in memory, and everything that was settled before.

    ranks: all that work on this block, each with its own rows, and with its own linears to quantize. experts_at_once:
    of how many experts the statistics are in memory at a time, None for all of them. across: what is shared with the
    other blocks of the run.
    """

    skeleton: Skeleton
    plan: RunPlan
    block_plan: BlockPlan
    recipe: Recipe
    block: nn.Module
    parameters: Mapping[str, Tensor]
    ranks: Ranks = field(default_factory=Ranks.alone)
    experts_at_once: int | None = None
    across: AcrossBlocks = field(default_factory=AcrossBlocks)

    @property
    def index(self) -> int:
        """Number of the block."""
        return self.block_plan.index

    @property
    def structure(self) -> BlockStructure:
        """What discovery found in this kind of block."""
        return self.block_plan.structure

    @property
    def device(self) -> torch.device:
        """Where the block computes."""
        return self.plan.probe.hidden.device

    @property
    def memory(self) -> BlockMemory:
        """What the largest block of the run needs."""
        return block_memory(self.skeleton, self.plan, self.recipe, self.experts_at_once)

    def weight(self, linear: str) -> Tensor:
        """The original float32 weight `[out, in]` of a linear."""
        view = self.structure.linear(linear)
        return view.oriented(matrix_of(self.parameters, view.weight))

    def producer(self, fold: Fold) -> dict[str, Tensor]:
        """The parameters of a fold's producer by name, a linear's weight as `[out, in]`."""
        found = {name: self.parameters[name] for name in fold.producer if name in self.parameters}
        if fold.producer_linear is not None:
            found[self.structure.linear(fold.producer_linear).weight] = self.weight(fold.producer_linear)
        return found

    def kept(self, linear: str) -> bool:
        """Whether the linear stays in full precision."""
        return self.block_plan.linears[linear].keep is not None
