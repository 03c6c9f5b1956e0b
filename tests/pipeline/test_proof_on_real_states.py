"""A fold that only looks exact on the random probe is refused where the block's real hidden states tell otherwise."""

from __future__ import annotations

import torch
from tiny_contexts import block_context, hidden_states, token_ids
from tiny_models import tiny_model
from torch import Tensor, nn

from awqkit.pipeline.activations import HiddenStates
from awqkit.pipeline.context import BlockContext
from awqkit.pipeline.observe_block import prove_folds

LARGEST_FACTOR = 4.0  # of the proof's powers of two


def test_a_clamp_that_only_real_states_reach_refuses_the_fold() -> None:
    """v is clamped where the probe stays below it, times any factor of the proof, and states along its rows do not."""
    context = block_context(tiny_model("llama"))
    states = hidden_states(context.skeleton, token_ids(2, 16))
    value = context.block.get_submodule("self_attn.v_proj")
    bound = 1.05 * LARGEST_FACTOR * float(_value(context, value, context.plan.probe.hidden).abs().max())
    value.register_forward_hook(lambda module, inputs, output: output.clamp(-bound, bound))

    proved, _ = prove_folds(context, _Same(context.plan.probe.hidden, states))
    assert "self_attn.v_proj" in [fold.label for fold, _ in proved]

    loud = _along_rows(context, value)
    assert float(_value(context, value, loud).abs().max()) * LARGEST_FACTOR > 1.5 * bound
    proved, refused = prove_folds(context, _Same(loud, states))
    assert "self_attn.v_proj" not in [fold.label for fold, _ in proved]
    assert any(entry.producer == "self_attn.v_proj" and "not exact" in entry.fallback for entry in refused)


class _Same:
    """Hidden states that are the given ones, whatever block asks."""

    def __init__(self, hidden: Tensor, states: HiddenStates) -> None:
        self._hidden, self._states = hidden, states

    def batches(self, block: int) -> list[tuple]:
        part, _, call, mask = next(iter(self._states.batches(block)))
        return [(part, self._hidden, call, mask)]


def _along_rows(context: BlockContext, value: nn.Module) -> Tensor:
    """One token for each of the first rows of v, along what the row and the norm before it amplify most."""
    like = context.plan.probe.hidden
    gain = context.block.get_submodule("input_layernorm").weight.detach()
    return (value.weight.detach() * gain)[: like.shape[1]].unsqueeze(0).clone()


def _value(context: BlockContext, value: nn.Module, hidden: Tensor) -> Tensor:
    with torch.no_grad():
        return value(context.block.get_submodule("input_layernorm")(hidden))
