"""The streams of hidden states before the first block, in batches that suit what will be done with them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from awqkit.model.skeleton import Skeleton
from awqkit.pipeline.activations import HiddenStates, TokenRows, usual_tokens_per_batch
from awqkit.pipeline.context import Stream, Streams
from awqkit.pipeline.end_gradients import BATCH_DIVISOR, measure_end_gradients
from awqkit.pipeline.ranks import Ranks
from awqkit.pipeline.row_parts import OwnRows, compared_rows, learnt_rows
from awqkit.recipe import Recipe

_PROBE_ROWS = 2  # calibration rows that the row weights are measured on
_CHECK_BATCH_DIVISOR = 4  # the check holds two more sets of the block's weights


def start_streams(
    skeleton: Skeleton,
    recipe: Recipe,
    rows: TokenRows,
    held_out: TokenRows | None,
    device: torch.device,
    step: Callable[[int], None],
    num_streams: int = 1,
    tokens_per_batch: int | None = None,
    reserved: float = 0.0,
    ranks: Ranks | None = None,
) -> Streams:
    """All streams that the recipe needs. step(block): called after each block of the pass for end-loss gradients.

    rows, held_out: all of them, of which each rank takes its own. num_streams, reserved: see `HiddenStates`.
    tokens_per_batch: None for as many as suit the device.
    """
    usual = tokens_per_batch or usual_tokens_per_batch(device)
    ranks = ranks or Ranks.alone(device)
    own = learnt_rows(len(rows.ids), ranks, recipe)
    mine = rows.rows(own.rows)

    def stream(part: TokenRows, of_part: OwnRows, batch_divisor: int = 1) -> Stream:
        tokens = max(1, usual // batch_divisor)
        original = HiddenStates(
            skeleton,
            part.rows(of_part.rows),
            device,
            tokens_per_batch=tokens,
            num_streams=num_streams * (2 if recipe.propagates else 1),
            reserved=reserved,
            own=of_part,
        )
        return Stream(original, original.copy() if recipe.propagates else None)

    gradients, checked = None, None
    if recipe.sensitivity != "none":
        gradients = measure_end_gradients(skeleton, mine, device, recipe.seed, step, usual, own, ranks)
    if held_out is not None:
        checked = stream(held_out, compared_rows(len(held_out.ids), ranks, recipe), _CHECK_BATCH_DIVISOR)
    return Streams(
        calibration=stream(rows, own, BATCH_DIVISOR if gradients is not None else 1),
        probe=HiddenStates(skeleton, rows.rows(slice(0, _PROBE_ROWS)), device, tokens_per_batch=usual),
        held_out=checked,
        gradients=gradients,
        weights=mine.weights,
    )
