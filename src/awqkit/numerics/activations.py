"""Inputs rounded to 8 bits at run time, one scale a token: what W8A8 does to x.

x̂_t = round(x_t / Δ_t) · Δ_t,   Δ_t = max_j |x_tj| / 127
"""

from __future__ import annotations

import torch
from torch import Tensor

TOP = 127.0


def round_tokens(inputs: Tensor) -> Tensor:
    """`inputs` `[..., in]` as 8-bit symmetric rounding per token leaves them, in their own dtype."""
    step = inputs.abs().amax(dim=-1, keepdim=True).float().div(TOP).clamp_(min=torch.finfo(torch.float32).tiny)
    return (inputs / step).round().mul(step).to(inputs.dtype)


def token_rounding_error(weight: Tensor, tokens: Tensor, channel_scale: Tensor, row_weight: Tensor) -> float:
    """Σ_i r_i E‖W_i (x − x̂)‖² that rounding x / s per token costs, measured on some tokens.

    weight: float32 `[out, in]` unscaled; tokens: float32 `[tokens, in]`; channel_scale: `[in]`; row_weight: r `[out]`.
    """
    lost = tokens - round_tokens(tokens / channel_scale) * channel_scale
    return float(((lost @ weight.t()).square() @ row_weight).mean()) if len(tokens) else 0.0
