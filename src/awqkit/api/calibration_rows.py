"""Token rows for a recipe: from a text by the model's tokenizer, or from ids that a caller gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from awqkit.calibration.rows import pack_rows, rows_from_ids
from awqkit.calibration.sources import read_documents
from awqkit.decisions import CalibrationSummary
from awqkit.errors import CalibrationError
from awqkit.model.transformers_bridge import TextEncoder
from awqkit.pipeline.activations import TokenRows
from awqkit.recipe import Recipe

_MAX_START_TOKENS = 4  # more that all rows share is text
_CHECK_TOKENS = 4096  # that held-out rows are thinned out to
_HELD_OUT_SHARE = 8  # one row held out for every so many calibration rows


@dataclass(frozen=True, slots=True)
class CalibrationRows:
    """calibration: rows for the statistics. held_out: rows for the check, or None. summary: where they are from."""

    calibration: TokenRows
    held_out: TokenRows | None
    summary: CalibrationSummary


def text_rows(
    recipe: Recipe, source: str | Path | None, encoder: TextEncoder, exclude_modules: frozenset[str] = frozenset()
) -> CalibrationRows:
    """As many rows as the recipe says, of `source` or, where that is None, of its own text. Raises CalibrationError.

    exclude_modules: standard library modules that the builtin text leaves out.
    """
    source = recipe.calibration if source is None else str(source)
    documents = read_documents(source, render_chat=encoder.render_chat, exclude=exclude_modules)
    rows = pack_rows(
        documents.texts,
        encoder.encode_all,
        samples=recipe.samples,
        held_out=max(1, recipe.samples // _HELD_OUT_SHARE),
        seq_len=recipe.seq_len,
        seed=recipe.seed,
        start_tokens=encoder.start_tokens,
        source=documents.label,
    )
    held_out = TokenRows(rows.held_out) if len(rows.held_out) else None
    return CalibrationRows(TokenRows(rows.calibration), held_out, replace(rows.summary, source=source_name(source)))


def source_name(source: str) -> str:
    """Of a file its name, since the way there is nobody's business; anything else as it is."""
    return Path(source).name if Path(source).expanduser().exists() else source


def given_rows(token_ids: Sequence[Sequence[int]] | Tensor) -> CalibrationRows:
    """Rows of a caller's own ids, lists or `[rows, tokens]`; every ninth of them is held out, padding is masked."""
    if isinstance(token_ids, Tensor):
        token_ids = token_ids.tolist()
    if not token_ids:
        raise CalibrationError("calibration: an empty list of token rows; give at least one row of token ids")
    ids, mask = rows_from_ids(token_ids)
    held = torch.arange(len(ids)) % (_HELD_OUT_SHARE + 1) == _HELD_OUT_SHARE
    parts = [TokenRows(ids[part], None if bool(mask.all()) else mask[part]) for part in (~held, held)]
    used = int(mask.sum())
    summary = CalibrationSummary(
        source="token rows given by the caller",
        documents_found=len(ids),
        documents_used=len(ids),
        tokens_found=used,
        rows=int((~held).sum()),
        held_out_rows=int(held.sum()),
        tokens_per_row=ids.shape[1],
        start_tokens=_start_of_all(token_ids),
        tokens_used=used,
    )
    return CalibrationRows(parts[0], parts[1] if bool(held.any()) else None, summary)


def enough_to_check(rows: CalibrationRows) -> CalibrationRows:
    """The rows with about 4096 held-out tokens, evenly spaced: enough to tell a choice that did harm, and cheaper."""
    if rows.held_out is None:
        return rows
    held_out = rows.held_out.rows(slice(None, None, max(1, rows.held_out.ids.numel() // _CHECK_TOKENS)))
    return replace(rows, held_out=held_out, summary=replace(rows.summary, checked_rows=len(held_out.ids)))


def _start_of_all(token_ids: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """What all rows begin with: the start tokens that the caller put there, if so few that they can be these."""
    same = (len(set(column)) == 1 for column in zip(*token_ids, strict=False))
    common = tuple(token_ids[0][: sum(1 for _ in takewhile(bool, same))])
    return common if len(common) <= _MAX_START_TOKENS else ()


def rows_text(used: CalibrationSummary) -> str:
    """One line about the rows."""
    start = f", each starting with token {' '.join(map(str, used.start_tokens))}" if used.start_tokens else ""
    return (
        f"calibration: {used.rows} rows and {used.held_out_rows} held out, of {used.tokens_per_row} tokens{start}, "
        f"from {used.documents_used} of {used.documents_found} documents of {used.source}; "
        f"{used.tokens_used:,} tokens used, {used.tokens_left:,} left"
    )
