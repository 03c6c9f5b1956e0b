"""What the largest block of a run needs of memory, and how many tokens and experts may be in it at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from awqkit.model.skeleton import Skeleton
from awqkit.model.structure import BlockStructure, LinearInput
from awqkit.numerics.statistics import whole_groups
from awqkit.pipeline.activations import usual_tokens_per_batch
from awqkit.pipeline.plan import RunPlan
from awqkit.recipe import Recipe

_SHARE = 0.5  # of the memory that a block leaves, for a batch; the rest is for what is kept of all rows
_EXPERTS_SHARE = 0.25  # of the free memory, for the statistics of a block's experts
_BATCH_BYTES = 2.6e9  # beyond it a GPU computes no faster: 8192 tokens of a block with hidden states of 4096
_MANY_EXPERTS = 32  # of which each is calls in every batch, that take a GPU longer than its tokens do
_TOKENS_OF_MANY, _BYTES_OF_MANY = 65536, 8e9  # of a batch of so many
_METRIC_COPIES = 4  # of the widest H, beside that of the statistics: Ĥ, C, U, and one on the way to U
_WEIGHT_COPIES = 6  # of the largest weight: scaled, codes, restored, and what a search holds of each


@dataclass(frozen=True, slots=True)
class BlockMemory:
    """Bytes on the device. weights: float32. statistics: H and G of all linears. search: at the largest linear.

    token: for each token of a batch, all inputs and outputs of linears and a few hidden states. experts: how many there
    are, of which each has `expert` of the statistics, all H; together: what is held of them where they go in chunks.
    is_bound_by_calls: whether a GPU waits for the calls of each expert, which larger batches make fewer.
    """

    weights: int
    statistics: int
    search: int
    token: int
    experts: int = 0
    expert: int = 0
    together: int = 0
    is_bound_by_calls: bool = False

    @property
    def fixed(self) -> int:
        """What does not depend on the batch."""
        return self.weights + self.statistics + self.search

    def with_experts(self, at_once: int | None) -> BlockMemory:
        """With the statistics of so many experts at a time; None for all."""
        if at_once is None or at_once >= self.experts:
            return self
        return replace(self, statistics=self.statistics - (self.experts - at_once) * self.expert + self.together)

    def least(self, tokens: int) -> int:
        """What is needed in any case, with one row of so many tokens."""
        return self.weights + self.statistics + tokens * self.token

    def with_tokens(self, tokens: int) -> int:
        """The peak with batches of so many tokens."""
        return self.fixed + tokens * self.token


def block_weights(skeleton: Skeleton) -> int:
    """Bytes of the largest block's parameters in float32."""
    return 4 * max(skeleton.block_elements(index) for index in range(skeleton.num_blocks))


def block_memory(skeleton: Skeleton, plan: RunPlan, recipe: Recipe, experts_at_once: int | None = None) -> BlockMemory:
    """Of the largest block, by its fixed part, with the statistics of so many experts at a time; None for all."""
    kinds = {skeleton.block_kind(block.index): block.index for block in plan.blocks}
    width = plan.probe.hidden[0, 0].numel()
    return max(
        (
            _of_block(4 * skeleton.block_elements(index), plan.blocks[index].structure, recipe, width, plan.group_size)
            for index in kinds.values()
        ),
        key=lambda found: found.with_experts(experts_at_once).fixed,
    ).with_experts(experts_at_once)


def _of_block(weights: int, structure: BlockStructure, recipe: Recipe, width: int, group_size: int) -> BlockMemory:
    channels = [entry.num_channels for entry in structure.inputs]
    blocks = None if recipe.looks_across_groups else group_size
    squares = [count * (whole_groups(count, blocks) or count) for count in channels]
    outputs = [view.shape[0] ** 2 for view in structure.linears] if recipe.sensitivity != "none" else []
    widest = max(squares) * (_METRIC_COPIES if recipe.rounding == "gptq" else 1)
    largest = max(rows * columns for rows, columns in (view.shape for view in structure.linears))
    if not recipe.needs_calibration:
        return BlockMemory(weights, 0, 4 * _WEIGHT_COPIES * largest, 0)
    statistics, search = 4 * (sum(squares) + sum(outputs)), 4 * (widest + _WEIGHT_COPIES * largest)
    experts: dict[object, int] = {}
    for entry, square in zip(structure.inputs, squares, strict=True):
        if entry.expert is not None:
            key = entry.expert.experts, entry.expert.index
            experts[key] = experts.get(key, 0) + 4 * square
    met = _met_by_every_token(structure)
    alike = [entries[0].num_channels for entries in structure.inputs_of_experts()]
    together = 4 * sum(count * (whole_groups(count, blocks) or count) for count in alike)
    read = sum(entry.num_channels for entry in met.values())
    written = sum(structure.linear(name).shape[0] for entry in met.values() for name in entry.readers)
    token = 4 * (3 * width + read + written)
    expert = sum(experts.values()) // max(len(experts), 1)
    is_bound_by_calls = len(experts) >= _MANY_EXPERTS and not recipe.looks_across_groups
    return BlockMemory(weights, statistics, search, token, len(experts), expert, together, is_bound_by_calls)


def _met_by_every_token(structure: BlockStructure) -> Mapping[object, LinearInput]:
    """The inputs, of like experts one: they run one after the other."""
    return {
        entry.first if entry.expert is None else (entry.expert.experts, entry.expert.part): entry
        for entry in structure.inputs
    }


def fitting_tokens(memory: BlockMemory, device: torch.device, free: float | None) -> int:
    """How many tokens a batch holds, a power of two: what suits device and block, less where memory is short.

    free: bytes of the device that are not in use, None where nobody knows.
    """
    usual = wanted = usual_tokens_per_batch(device)
    if memory.token == 0:
        return usual
    if device.type == "cuda":
        most, size = (_TOKENS_OF_MANY, _BYTES_OF_MANY) if memory.is_bound_by_calls else (usual, _BATCH_BYTES)
        wanted = min(most, int(size / memory.token))
    room = wanted if free is None else int(_SHARE * (free - memory.fixed) / memory.token)
    return 1 << max(1, min(wanted, room)).bit_length() - 1


def fitting_experts(memory: BlockMemory, free: float | None, copies: int) -> int | None:
    """Of how many experts the statistics are to be in memory at a time, None for all: those of all if they fit.

    free: as for `fitting_tokens`. copies: how often each H is there while rows are summed, see `copies_of_sums`.
    """
    if free is None or memory.experts * memory.expert * copies <= _EXPERTS_SHARE * free:
        return None
    at_once = max(1, min(memory.experts, int(_EXPERTS_SHARE * free / (memory.expert * copies))))
    chunks = -(-memory.experts // at_once)
    return -(-memory.experts // chunks)  # no more chunks than must be: each is a run of the block
