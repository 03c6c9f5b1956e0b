"""How a model calls its blocks: recorded from its own forward, and checked to be one block after the other.

Recorders stand in the blocks' places. Each hands on a copy of what it got, and the next must get that copy: then, and
only then, may the blocks be run one by one on each other's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from awqkit.errors import ModelError
from awqkit.model.named_blocks import NamedBlocks


@dataclass(frozen=True, slots=True)
class BlockCall:
    """The arguments of one block besides the hidden states, as the model itself passes them."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BlockInputs:
    """What a batch of rows turns into before the first block: `hidden` `[rows, tokens, width]`, one call per block."""

    hidden: Tensor
    calls: tuple[BlockCall, ...]


def run_block(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """The block's output hidden states, `[rows, tokens, width]`."""
    outputs = block(hidden, *call.args, **call.kwargs)
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs


class _HandsMore(ModelError):
    """Blocks that pass something on beside the hidden states: no other answer would be the model's own."""


class _Beside:
    """Stands for what a block gives beside its hidden states; no block may get it."""


Answer = Callable[[Tensor], Any]

# How a block gives its hidden states back, the plainest first: what the model's own forward accepts is taken.
_ANSWERS: tuple[Answer, ...] = (
    lambda hidden: hidden,
    lambda hidden: (hidden,),
    lambda hidden: (hidden, _Beside()),
    lambda hidden: (hidden, None),
    lambda hidden: (hidden, _Beside(), _Beside()),
    lambda hidden: (hidden, None, None),
)


def record_calls(
    decoder: Callable[..., Any],
    blocks: NamedBlocks,
    where: str,
    ids: Tensor,
    mask: Tensor | None,
    answer: Answer | None,
) -> tuple[BlockInputs, Answer]:
    """What `decoder` calls its `blocks` with for the token ids `[rows, tokens]`, and how it wants them to answer.

    where: the path of the blocks, for messages. answer: what was found before, or None to find it. Raises ModelError
    where the blocks are not called once, in order and on each other's outputs alone.
    """
    failed: list[tuple[int, ModelError]] = []  # how many blocks were reached, and what went wrong then
    for each in _ANSWERS if answer is None else (answer,):
        calls: list[BlockCall] = []
        try:
            return _recorded(decoder, blocks, where, ids, mask, each, calls), each
        except _HandsMore:
            raise
        except ModelError as error:
            failed.append((len(calls), error))
    raise max(failed, key=lambda one: one[0])[1]


def _recorded(
    decoder: Callable[..., Any],
    blocks: NamedBlocks,
    where: str,
    ids: Tensor,
    mask: Tensor | None,
    answer: Answer,
    calls: list[BlockCall],
) -> BlockInputs:
    """See `record_calls`; calls: empty, gets those of the blocks that were reached."""
    hidden: list[Tensor] = []
    handed: list[Tensor] = []  # what the block before gave

    def record(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if index != len(calls):
                raise ModelError(f"block {index} of {where} was called out of order: cannot stream it")
            inputs, rest, kwargs = _split_hidden(args, kwargs, f"block {index} of {where}")
            _check(inputs, (*rest, *kwargs.values()), index, handed, ids, where)
            if index == 0:
                hidden.append(inputs)
            calls.append(BlockCall(rest, kwargs))
            handed[:] = [inputs.clone()]
            return answer(handed[0])

        return forward

    keywords = {} if mask is None else {"attention_mask": mask.to(torch.int64)}
    try:
        with torch.no_grad(), blocks_replaced(blocks, record):
            decoder(input_ids=ids, use_cache=False, **keywords)
    except (NotImplementedError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        if len(calls) != len(blocks):
            raise ModelError(f"the model's forward could not be followed through its blocks: {error}") from error
    if len(calls) != len(blocks):
        raise ModelError(f"the model visited {len(calls)} of its {len(blocks)} blocks in {where}")
    return BlockInputs(hidden[0].detach(), tuple(calls))


def _check(inputs: Tensor, others: tuple[Any, ...], index: int, handed: list[Tensor], ids: Tensor, where: str) -> None:
    if index == 0 and inputs.shape[:2] != ids.shape:
        raise ModelError(
            f"{where}: the first block gets hidden states of shape {list(inputs.shape)} for "
            f"{len(ids)} rows of {ids.shape[1]} tokens, expected these two first: cannot stream it"
        )
    if index > 0 and not _same(inputs, handed[0]):
        raise ModelError(
            f"{where}: block {index} reads something else than what block {index - 1} gives, "
            "so the model computes between its blocks: cannot stream it"
        )
    if any(isinstance(each, _Beside) for each in others):
        raise _HandsMore(
            f"{where}: block {index - 1} hands block {index} more than the hidden states: cannot stream it"
        )


@contextmanager
def blocks_replaced(blocks: NamedBlocks, forward_of: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Inside, the model calls `forward_of(index)` in the place of each block."""
    originals = list(blocks)
    for index, block in enumerate(originals):
        blocks[index] = _Recorder(block, forward_of(index))
    try:
        yield
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block


class _Recorder(nn.Module):
    """Stands in a block's place; other attributes (an attention type, say) are those of the block."""

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)
        object.__setattr__(self, "forward", forward)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_block"), name)


def _same(found: Any, expected: Tensor) -> bool:
    """Equal number by number; NaN is equal to NaN, a damaged checkpoint is found elsewhere."""
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    return torch.allclose(found, expected, rtol=0.0, atol=0.0, equal_nan=True)


def _split_hidden(args: tuple, kwargs: dict[str, Any], block: str) -> tuple[Tensor, tuple, dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    if "hidden_states" not in rest:
        raise ModelError(
            f"{block} is called with keywords only ({', '.join(rest) or 'none'}): which of them is the hidden states "
            "is not clear, they must come first and without a name: cannot stream it"
        )
    return rest.pop("hidden_states"), (), rest
