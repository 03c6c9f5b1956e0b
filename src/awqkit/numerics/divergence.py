"""How far a quantized model's predictions are from the original's: KL divergence and top-1 agreement."""

from __future__ import annotations

from torch import Tensor


def token_kl(reference_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(reference ‖ model) per position, nats, `[...]` float32; both logits `[..., vocabulary]`; differentiable."""
    reference = reference_logits.float().log_softmax(dim=-1)
    return (reference.exp() * (reference - logits.float().log_softmax(dim=-1))).sum(dim=-1)


def kl_gradient(reference_logits: Tensor, logits: Tensor) -> Tensor:
    """The derivative of each position's `token_kl` by its own logits, softmax(model) − softmax(reference), float32."""
    return logits.float().softmax(dim=-1).sub_(reference_logits.float().softmax(dim=-1))


def same_top1(reference_logits: Tensor, logits: Tensor) -> Tensor:
    """Whether both put the same token first, bool `[...]`."""
    return reference_logits.argmax(dim=-1) == logits.argmax(dim=-1)
