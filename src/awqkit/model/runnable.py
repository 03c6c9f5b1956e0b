"""A model without weights and the ways in which it is run, whichever library it is of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from awqkit.model.block_list import find_block_list
from awqkit.model.named_blocks import NamedBlocks


@dataclass(frozen=True, slots=True)
class Runnable:
    """What a Skeleton needs to know of a model.

    module: all of it, parameters on the meta device. decoder: the part of it that calls the blocks. where: what
    messages call the blocks. reach, reach_again: run the decoder as transformers runs one (`input_ids=`, `use_cache=`,
    `attention_mask=`); the second may stop behind the last block. logits(ids, mask): `[rows, tokens, vocabulary]`.
    advice: what to pass where the model cannot be followed, appended to messages.
    """

    module: nn.Module
    decoder: nn.Module
    blocks: NamedBlocks
    where: str
    reach: Callable[..., Any]
    reach_again: Callable[..., Any]
    logits: Callable[[Tensor, Tensor | None], Tensor]
    vocabulary_size: Callable[[], int]
    advice: str = ""


def transformers_runnable(model: nn.Module) -> Runnable:
    """A causal language model of transformers; its blocks are found by structure. Raises ModelError, see block_list."""
    where = find_block_list(model)
    decoder = getattr(model, "base_model", model)

    def logits(ids: Tensor, mask: Tensor | None) -> Tensor:
        keywords = {} if mask is None else {"attention_mask": mask.to(torch.int64)}
        return model(input_ids=ids, use_cache=False, **keywords).logits

    return Runnable(
        module=model,
        decoder=decoder,
        blocks=NamedBlocks(model, [f"{where}.{index}" for index in range(len(model.get_submodule(where)))]),
        where=where,
        reach=decoder,
        reach_again=decoder,
        logits=logits,
        vocabulary_size=lambda: model.get_input_embeddings().weight.shape[0],
    )
