"""From documents to token rows: encode, join, cut, choose.

The rule, which published figures depend on: the text tokens of all documents, in order and with nothing
between them, form one stream; the stream is cut into non-overlapping windows of `seq_len -
len(start_tokens)` tokens; each row is the start tokens followed by one window; a seeded permutation of the
windows gives first the calibration rows, then the held-out rows. Every row is full, so there is no padding.

What text it is and which tokenizer encodes it is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awqkit.decisions import CalibrationSummary
from awqkit.errors import CalibrationError

PAD_ID = 0  # never read: the mask says which positions count


@dataclass(frozen=True, slots=True)
class Rows:
    """Token rows that all have the same length.

    calibration: `[samples, seq_len]`, int64, token ids.
    held_out: `[held_out, seq_len]`, int64; may have fewer rows than were asked for, or none.
    summary: which text was read and how much of it the two take.
    """

    calibration: Tensor
    held_out: Tensor
    summary: CalibrationSummary


@dataclass(frozen=True, slots=True)
class TokenStream:
    """The text tokens of all documents in one line.

    ids: `[tokens]`, int64.
    document_ends: `[documents]`, int64, where in `ids` each document ends (exclusive).
    """

    ids: Tensor
    document_ends: Tensor


EncodeAll = Callable[[Sequence[str]], Iterable[Sequence[int]]]  # each text's ids, without special tokens


def token_stream(documents: Iterable[str], encode_all: EncodeAll) -> TokenStream:
    """The tokens of the documents, joined by nothing."""
    parts = [torch.tensor(ids, dtype=torch.int64) for ids in encode_all(list(documents))]
    lengths = torch.tensor([len(part) for part in parts], dtype=torch.int64)
    ids = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
    return TokenStream(ids, lengths.cumsum(0))


def cut_windows(ids: Tensor, seq_len: int, start_tokens: Sequence[int] = ()) -> Tensor:
    """`ids` `[tokens]` as rows `[windows, seq_len]` that start with `start_tokens`; the rest is left over.

    Raises CalibrationError where `seq_len` leaves no room for a predicted token.
    """
    window = _window_length(seq_len, start_tokens)
    num_windows = len(ids) // window
    windows = ids[: num_windows * window].reshape(num_windows, window)
    start = torch.tensor(start_tokens, dtype=torch.int64).expand(num_windows, len(start_tokens))
    return torch.cat([start, windows], dim=1)


def pack_rows(
    documents: Iterable[str],
    encode_all: EncodeAll,
    *,
    samples: int,
    held_out: int,
    seq_len: int,
    seed: int,
    start_tokens: tuple[int, ...] = (),
    source: str,
) -> Rows:
    """`samples` calibration rows and up to `held_out` held-out rows, by the rule at the top of this file.

    `source` names the text in the summary and in messages. Fewer held-out rows than asked for are not an error: the
    summary has their number. Raises CalibrationError where the text has fewer than `samples` windows.
    """
    if samples < 1 or held_out < 0:
        raise CalibrationError(f"{samples} calibration and {held_out} held-out rows: at least 1 and 0 are needed")
    window = _window_length(seq_len, start_tokens)
    stream = token_stream(documents, encode_all)
    windows = cut_windows(stream.ids, seq_len, start_tokens)
    if len(windows) < samples:
        raise CalibrationError(
            f"{source}: {len(stream.ids)} tokens found, but {samples} rows of {seq_len} tokens need {samples * window}"
            f"{' beside their start tokens' if start_tokens else ''}; "
            "give more text, or a smaller --samples or --seq-len"
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    chosen = order[: samples + held_out]
    summary = CalibrationSummary(
        source=source,
        documents_found=len(stream.document_ends),
        documents_used=_count_documents(stream.document_ends, chosen, window),
        tokens_found=len(stream.ids),
        rows=samples,
        held_out_rows=len(chosen) - samples,
        tokens_per_row=seq_len,
        start_tokens=tuple(start_tokens),
        tokens_used=len(chosen) * window,
    )
    return Rows(windows[chosen[:samples]], windows[chosen[samples:]], summary)


def rows_from_ids(token_ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of any lengths: ids `[rows, longest]` int64, padded on the right, and mask `[rows, longest]` bool.

    The mask is True where a token is real. Raises CalibrationError for no rows or a row without tokens.
    """
    if not token_ids:
        raise CalibrationError("no rows of token ids given; at least one is needed")
    lengths = [len(row) for row in token_ids]
    if min(lengths) == 0:
        raise CalibrationError(f"row {lengths.index(0)} of the token ids is empty; leave it out")
    ids = torch.full((len(lengths), max(lengths)), PAD_ID, dtype=torch.int64)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for index, row in enumerate(token_ids):
        ids[index, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
        mask[index, : len(row)] = True
    return ids, mask


def _window_length(seq_len: int, start_tokens: Sequence[int]) -> int:
    window = seq_len - len(start_tokens)
    if window < 1:
        raise CalibrationError(
            f"--seq-len {seq_len} leaves no room for text after {len(start_tokens)} start tokens; pass a longer one"
        )
    return window


def _count_documents(document_ends: Tensor, chosen: Tensor, window: int) -> int:
    """How many documents have a token in one of the `chosen` windows."""
    positions = chosen[:, None] * window + torch.arange(window)
    # right=True: position p lies in the first document whose (exclusive) end is greater than p
    return len(torch.bucketize(positions, document_ends, right=True).unique())
