"""Whether a block is a decoder's, by asking it: an encoder lets a token see the ones after it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from awqkit.model.block_calls import BlockCall, run_block

_TOLERANCE = 1e-3  # of the block's own contribution; a causal block changes by nothing but summation order


def sees_later_tokens(block: nn.Module, hidden: Tensor, call: BlockCall) -> bool:
    """Whether another last token changes the block's output at the tokens before it.

    hidden: `[rows, tokens, width]` with at least two tokens; only its last token is replaced.
    """
    changed = hidden.clone()
    changed[:, -1] = -hidden[:, -1]
    with torch.no_grad():
        plain = run_block(block, hidden, call)
        difference = run_block(block, changed, call) - plain
    contribution = (plain - hidden).abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return bool(difference[:, :-1].abs().max() > _TOLERANCE * contribution)
