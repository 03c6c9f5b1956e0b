"""Blocks of tiny models as the pipeline's steps get them, and whole runs on them."""

from __future__ import annotations

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
from awqkit.pipeline.context import BlockContext
from awqkit.pipeline.plan import plan_run

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
    recipe = recipe or Recipe(group_size=GROUP)
    skeleton, awq = Skeleton(model.config, WeightsOf(model)), FORMATS["awq"]
    plan = plan_run(skeleton, recipe, torch.bfloat16, CPU, awq.why_not_held, awq.fused_partners)
    block = skeleton.load_block(index, CPU)
    parameters = {name: value.data for name, value in block.named_parameters()}
    return BlockContext(skeleton, plan, plan.blocks[index], recipe, block, parameters)


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
