"""A model without weights and the ways in which it is run, whichever library it is of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from awqkit.model.block_list import find_block_lists
from awqkit.model.named_blocks import NamedBlocks


@dataclass(frozen=True, slots=True)
class Runnable:
    """What a Skeleton needs to know of a model.

    module: all of it, parameters on the meta device. decoder: the part of it that calls the blocks. lists: what may be
    the list of them, the likeliest first. reach: runs the decoder as transformers runs one (`input_ids=`, `use_cache=`,
    `attention_mask=`). reach_blocks(path): a function that does so and may stop behind the block at `path`, the last.
    logits(ids, mask): `[rows, tokens, vocabulary]`. advice: what to pass where the model cannot be followed, appended
    to messages.
    """

    module: nn.Module
    decoder: nn.Module
    lists: tuple[NamedBlocks, ...]
    reach: Callable[..., Any]
    reach_blocks: Callable[[str], Callable[..., Any]]
    logits: Callable[[Tensor, Tensor | None], Tensor]
    vocabulary_size: Callable[[], int]
    advice: str = ""


def transformers_runnable(model: nn.Module) -> Runnable:
    """A causal language model of transformers; its blocks are found by structure. Raises ModelError, see block_list."""
    decoder = getattr(model, "base_model", model)

    def logits(ids: Tensor, mask: Tensor | None) -> Tensor:
        keywords = {} if mask is None else {"attention_mask": mask.to(torch.int64)}
        return model(input_ids=ids, use_cache=False, **keywords).logits

    return Runnable(
        module=model,
        decoder=decoder,
        lists=tuple(NamedBlocks.of_list(model, path) for path in find_block_lists(model)),
        reach=decoder,
        reach_blocks=lambda path: decoder,
        logits=logits,
        vocabulary_size=lambda: model.get_input_embeddings().weight.shape[0],
    )
