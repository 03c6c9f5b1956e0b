"""The streams of all ranks together on the first one, for the disk and for tuning, and back from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from awqkit.model.block_calls import Carried, leaves
from awqkit.pipeline.activations import HiddenStates
from awqkit.pipeline.context import Stream, Streams
from awqkit.pipeline.ranks import Ranks
from awqkit.pipeline.row_parts import OwnRows, own_rows

# Hidden states `[rows, tokens, width]` of all rows, and what goes with them, each with the number of its first row.
Whole = tuple[Tensor, Sequence[tuple[int, tuple[Carried, ...]]]]

_PROBE = "probe"  # the same rows on every rank


def gathered_streams(
    ranks: Ranks, streams: Streams, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Whole] | None:
    """On the first rank all rows of the streams that are wanted, by name; None on the others."""
    own: dict[str, Whole] = {name: states.held() for name, states in streams.named.items() if wanted(name)}
    if ranks.size == 1:
        return own
    of_ranks = ranks.gathered({name: held for name, held in own.items() if ranks.is_first or name != _PROBE})
    if of_ranks is None:
        return None
    return {name: _joined([each[name] for each in of_ranks if name in each]) for name in own}


def _joined(held: Sequence[Whole]) -> Whole:
    hidden = [states.cpu() for states, _ in held if len(states)]
    return torch.cat(hidden), [piece for _, pieces in held for piece in pieces]


def put_streams(ranks: Ranks, streams: Streams, saved: Mapping[str, Whole] | None) -> None:
    """Put every rank's streams where the gathered ones were, whoever gathered them. saved: None but on the first."""

    def of_rank(rank: int) -> dict[str, Whole]:
        assert saved is not None
        found: dict[str, Whole] = {}
        for name, (hidden, pieces) in saved.items():
            rows = slice(0, len(hidden)) if name == _PROBE else own_rows(len(hidden), ranks, rank).rows
            found[name] = hidden[rows], [piece for piece in pieces if _overlaps(piece, rows)]
        return found

    found = ranks.handed_out(None if saved is None else of_rank)
    for name, states in streams.named.items():
        states.put(*found[name])


def _overlaps(piece: tuple[int, tuple[Carried, ...]], rows: slice) -> bool:
    first, beside = piece
    tensors = leaves(beside)
    return not tensors or (first < rows.stop and first + len(tensors[0]) > rows.start)


def streams_to_tune(ranks: Ranks, streams: Streams) -> Streams | None:
    """On the first rank the streams with the rows of all ranks in what tuning reads; None on the others."""
    if ranks.size == 1:
        return streams
    whole = gathered_streams(ranks, streams, lambda name: name not in (_PROBE, "calibration quantized"))
    if whole is None:
        return None

    def standing(name: str, states: HiddenStates) -> HiddenStates:
        hidden, _ = whole[name]
        return states.standing_in(hidden, OwnRows.undivided(len(hidden)))

    held_out = streams.held_out
    if held_out is not None:
        quantized = held_out.quantized
        quantized = None if quantized is None else standing("held out quantized", quantized)
        held_out = Stream(standing("held out", held_out.original), quantized)
    calibration = Stream(standing("calibration", streams.calibration.original))
    return replace(streams, calibration=calibration, held_out=held_out)
