"""Drawing tokens from logits, the same ones on every run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_PIECE = 256  # tokens of the vocabulary that are summed together


def draw_chances(num_tokens: int, num_rows: int, seed: int) -> Tensor:
    """`[tokens, rows, 1]` float32, uniform in [0, 1), on the CPU: the same ones however they are used up."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.rand(num_rows, 1, generator=generator) for _ in range(num_tokens)])


def drawn_tokens(logits: Tensor, chance: Tensor) -> Tensor:
    """Token ids `[rows, 1]` int64: where the cumulated probabilities of `logits` `[rows, vocabulary]` pass `chance`.

    chance: `[rows, 1]`, uniform in [0, 1). Inverse transform sampling (Devroye 1986, section II.2). The sum is taken
    in float64: a GPU adds in no fixed order, and in float32 that moves a boundary between two tokens often enough to
    change one draw in some hundreds, and with it all that a model writes after it.
    """
    shares, count = logits.float().softmax(dim=-1), logits.shape[-1]
    pieces = F.pad(shares, (0, -count % _PIECE)).reshape(len(shares), -1, _PIECE)
    # the piece that it is in, then the token in that piece: a GPU walks along one long row of sums slowly
    reached = pieces.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    wanted = chance.to(reached) * reached[:, -1:]
    piece = torch.searchsorted(reached, wanted, right=True).clamp_(max=reached.shape[1] - 1)
    before = F.pad(reached, (1, 0)).gather(1, piece)
    inside = pieces.take_along_dim(piece.unsqueeze(-1), dim=1)[:, 0].cumsum(dim=-1, dtype=torch.float64)
    place = torch.searchsorted(inside, wanted - before, right=True).clamp_(max=_PIECE - 1)
    return (piece * _PIECE + place).clamp_(max=count - 1)
