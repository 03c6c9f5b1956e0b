"""Blocks of tiny models as the pipeline's steps get them, and whole runs on them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tiny_models import WeightsOf, save_tiny, token_rows
from torch import Tensor

from awqkit import Recipe, RunOptions, quantize
from awqkit.api.quantize import QuantizeResult
from awqkit.formats.format import FORMATS
from awqkit.model.skeleton import Skeleton
from awqkit.pipeline.activations import HiddenStates, TokenRows
from awqkit.pipeline.block_step import BlockResult, quantize_block
from awqkit.pipeline.context import BlockContext, Stream, Streams
from awqkit.pipeline.end_gradients import EndGradients
from awqkit.pipeline.plan import RunPlan, plan_run
from awqkit.pipeline.ranks import Ranks
from awqkit.pipeline.row_parts import own_rows

CPU = torch.device("cpu")
GROUP = 32


def token_ids(rows: int, tokens: int, seed: int = 0) -> Tensor:
    """Random rows as a tensor `[rows, tokens]`."""
    return torch.tensor(token_rows(rows, tokens, seed))


def hidden_states(skeleton: Skeleton, ids: Tensor, mask: Tensor | None = None) -> HiddenStates:
    """What the first block reads of these rows."""
    return HiddenStates(skeleton, TokenRows(ids, mask), CPU)


def block_context(model: Any, index: int = 0, recipe: Recipe | None = None) -> BlockContext:
    """One block of the model with its weights in memory."""
    skeleton, awq = Skeleton(model.config, WeightsOf(model)), FORMATS["awq"]
    recipe = recipe or Recipe(group_size=GROUP)
    plan = plan_run(skeleton, recipe, torch.bfloat16, CPU, awq.why_not_held, awq.fused_partners)
    return _context(skeleton, plan, recipe, index)


def _context(skeleton: Skeleton, plan: RunPlan, recipe: Recipe, index: int) -> BlockContext:
    block = skeleton.load_block(index, CPU)
    parameters = {name: value.data for name, value in block.named_parameters()}
    return BlockContext(skeleton, plan, plan.blocks[index], recipe, block, parameters)


def quantized_blocks(
    model: Any, recipe: Recipe, ids: Tensor, held_out: Tensor | None = None, gradients: EndGradients | None = None
) -> Iterator[tuple[BlockContext, BlockResult, Streams]]:
    """Each block quantized in turn, as a run does it; the streams have just moved on to its output."""
    skeleton, awq = Skeleton(model.config, WeightsOf(model)), FORMATS["awq"]
    plan = plan_run(skeleton, recipe, torch.bfloat16, CPU, awq.why_not_held, awq.fused_partners)

    def stream(rows: Tensor) -> Stream:
        original = HiddenStates(skeleton, TokenRows(rows), CPU, own=own_rows(len(rows), Ranks.alone()))
        return Stream(original, original.copy() if recipe.propagates else None)

    check = None if held_out is None else stream(held_out)
    streams = Streams(stream(ids), hidden_states(skeleton, ids[:2]), check, gradients)
    for index in range(skeleton.num_blocks):
        context = _context(skeleton, plan, recipe, index)
        yield context, quantize_block(context, streams, lambda stage: None), streams
        skeleton.release_block(index)


def current(states: HiddenStates) -> Tensor:
    """Where a stream's rows are, `[rows, tokens, width]`."""
    return torch.cat([hidden.clone() for _, hidden, _, _ in states.batches(0)])


def sampled_loss(logits: Tensor, mask: Tensor | None, seed: int) -> Tensor:
    """−log p summed over the real tokens, of labels drawn from the model with one number per token, row by row."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(())
    for row in range(len(logits)):
        chance = torch.rand(logits.shape[1], 1, generator=generator)
        for token in range(logits.shape[1]):
            if mask is not None and not mask[row, token]:
                continue
            probabilities = logits[row, token].detach().softmax(dim=-1)
            label = int((probabilities.cumsum(dim=-1) < chance[token]).sum())
            total = total - logits[row, token].log_softmax(dim=-1)[min(label, logits.shape[-1] - 1)]
    return total


def run_on(model: Any, folder: Path, recipe: Recipe, *, rows: int = 36, **choices: Any) -> QuantizeResult:
    """Save the model under `folder` and quantize it on random rows, every ninth of them held out."""
    source = folder / "source"
    if not source.exists():
        save_tiny(model, source)
    calibration = token_rows(rows, 24) if recipe.needs_calibration else None
    out = folder / choices.pop("out", "out")
    return quantize(source, out, recipe, calibration=calibration, options=RunOptions(device="cpu"), **choices)


def written(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a written checkpoint."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors
