"""A step that runs out of memory begins again from where it began, with batches of half as many tokens."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterable
from typing import TypeVar

import torch

from awqkit.errors import NoRoomError
from awqkit.events import Caution, Emit
from awqkit.model.skeleton import Skeleton
from awqkit.pipeline.activations import HiddenStates
from awqkit.pipeline.block_memory import BlockMemory
from awqkit.pipeline.free_memory import free_bytes

Result = TypeVar("Result")

_NO_ROOM = (
    "{what} does not fit into the memory of {kind}, even with one row of {tokens} tokens at a time: about {needed:.1f} "
    "GB are needed, {free:.1f} GB are free; shorter rows (--seq-len) or a device with more memory would do"
)
_ALLOCATION_FAILED = ("CUBLAS_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


def may_run_out(device: torch.device) -> bool:
    """Whether a device says so when memory runs out; a host rather ends the process."""
    return device.type == "cuda"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that device memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _ALLOCATION_FAILED)


def begin_block(moving: Iterable[HiddenStates], device: torch.device) -> None:
    """Mark all that moves through a block at its input, where memory may run out inside it."""
    if may_run_out(device):
        for states in moving:
            states.mark()


def run_again(
    step: Callable[[], Result], smaller: Callable[[], int | None], what: str, device: torch.device, emit: Emit
) -> Result:
    """`step` until it does not run out of memory. smaller: makes batches smaller, None where they are single rows.

    what: is run, for people. The last error passes where there is nothing to make smaller.
    """
    while True:
        try:
            return step()
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not may_run_out(device) or not is_out_of_memory(error):
                raise
            failed = error.with_traceback(None)  # whose frames hold what memory is needed for
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        tokens = smaller()
        if tokens is None:
            raise failed
        emit(Caution(f"{what}: {device.type} ran out of memory; begun again with {tokens} tokens at a time"))


def halve(moving: Collection[HiddenStates], skeleton: Skeleton) -> bool:
    """Put all back where the block began, with batches half as large; False where all are single rows."""
    for states in moving:
        states.put_back()
    if all(states.is_row_by_row for states in moving):
        return False
    for states in moving:
        states.halve_batches(skeleton)
    return True


def no_room(what: str, memory: BlockMemory, tokens_per_row: int, device: torch.device) -> NoRoomError:
    """The error of a block that not even one row fits beside."""
    return NoRoomError(
        _NO_ROOM.format(
            what=what,
            kind=device.type,
            tokens=tokens_per_row,
            needed=memory.with_tokens(tokens_per_row) / 1e9,
            free=(free_bytes(device) or 0.0) / 1e9,
        )
    )
