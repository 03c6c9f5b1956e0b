"""Rows against the rule written as an obvious loop, and every refusal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from awqkit.calibration.rows import cut_windows, pack_rows, rows_from_ids, token_stream
from awqkit.errors import CalibrationError


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


def encode_all(texts: list[str]) -> list[list[int]]:
    return [encode(text) for text in texts]


def rows_by_loop(documents, samples, held_out, seq_len, seed, start_tokens):
    """The rule of rows.py in plain lists; also how many documents have a token in a chosen row."""
    stream = [(token, number) for number, document in enumerate(documents) for token in encode(document)]
    window = seq_len - len(start_tokens)
    windows = []
    while (len(windows) + 1) * window <= len(stream):
        windows.append(stream[len(windows) * window : (len(windows) + 1) * window])
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [windows[index] for index in order[: samples + held_out]]
    rows = [[*start_tokens, *(token for token, _ in part)] for part in chosen]
    return rows[:samples], rows[samples:], len({number for part in chosen for _, number in part})


@settings(deadline=None, max_examples=60)
@given(
    documents=st.lists(st.text(alphabet="abcdef", max_size=30), max_size=12),
    samples=st.integers(1, 4),
    held_out=st.integers(0, 4),
    seq_len=st.integers(3, 7),
    seed=st.integers(0, 5),
    start_tokens=st.sampled_from([(), (1,), (1, 2)]),
)
def test_rows_follow_the_rule(documents, samples, held_out, seq_len, seed, start_tokens):
    arguments = {
        "samples": samples,
        "held_out": held_out,
        "seq_len": seq_len,
        "seed": seed,
        "start_tokens": start_tokens,
    }
    calibration, rest, documents_used = rows_by_loop(documents, **arguments)
    if len(calibration) < samples:
        with pytest.raises(CalibrationError):
            pack_rows(documents, encode_all, source="text", **arguments)
        return
    rows = pack_rows(documents, encode_all, source="text", **arguments)
    assert rows.calibration.tolist() == calibration
    assert rows.held_out.tolist() == rest
    assert rows.held_out.shape == (len(rest), seq_len)
    assert rows.calibration.dtype == rows.held_out.dtype == torch.int64
    summary = rows.summary
    assert (summary.rows, summary.held_out_rows) == (samples, len(rest))
    assert summary.documents_found == len(documents)
    assert summary.documents_used == documents_used
    assert summary.tokens_found == sum(map(len, documents))
    assert summary.tokens_used == (samples + len(rest)) * (seq_len - len(start_tokens))
    assert summary.tokens_left >= 0


def test_all_documents_are_encoded_in_one_call():
    calls = []
    pack_rows(
        ["a" * 60, "b" * 40],
        lambda texts: calls.append(texts) or encode_all(texts),
        samples=2,
        held_out=0,
        seq_len=10,
        seed=0,
        source="text",
    )
    assert calls == [["a" * 60, "b" * 40]]


def test_too_little_text_says_how_much_is_needed():
    with pytest.raises(CalibrationError) as caught:
        pack_rows(["a" * 17], encode_all, samples=3, held_out=1, seq_len=7, seed=0, start_tokens=(9,), source="few.txt")
    message = str(caught.value)
    assert "few.txt: 17 tokens found" in message
    assert "3 rows of 7 tokens need 18" in message
    assert "--samples" in message and "--seq-len" in message and "\n" not in message


def test_held_out_rows_are_as_many_as_there_are():
    rows = pack_rows(["a" * 34], encode_all, samples=2, held_out=8, seq_len=10, seed=0, source="text")
    assert rows.summary.held_out_rows == len(rows.held_out) == 1
    assert rows.summary.tokens_left == 4


@pytest.mark.parametrize("samples, held_out", [(0, 1), (1, -1)])
def test_impossible_counts_are_refused(samples, held_out):
    with pytest.raises(CalibrationError, match="at least 1 and 0"):
        pack_rows(["abc"], encode_all, samples=samples, held_out=held_out, seq_len=2, seed=0, source="text")


def test_start_tokens_must_leave_room():
    with pytest.raises(CalibrationError, match="--seq-len 2 leaves no room"):
        cut_windows(torch.arange(9), 2, (5, 6))


def test_stream_knows_where_documents_end():
    stream = token_stream(["ab", "", "c"], encode_all)
    assert stream.ids.tolist() == encode("abc")
    assert stream.document_ends.tolist() == [2, 2, 3]
    assert token_stream([], encode_all).ids.shape == (0,)


def test_rows_of_different_lengths_are_padded_and_masked():
    ids, mask = rows_from_ids([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)


@pytest.mark.parametrize("token_ids, found", [([], "no rows"), ([[1], []], "row 1")])
def test_rows_without_tokens_are_refused(token_ids, found):
    with pytest.raises(CalibrationError, match=found):
        rows_from_ids(token_ids)
