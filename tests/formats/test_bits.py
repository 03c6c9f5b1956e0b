"""The AWQ bit order: golden words, a slow obvious oracle, and unpack undoes pack."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from awqkit.formats.bits import ORDER, pack_columns, unpack_columns

GOLDEN = [
    (range(1, 9), 0x86427531),
    (range(8), 0x75316420),
    (range(8, 16), 0xFDB9ECA8),
    ([8] * 8, 0x88888888),
    ([0] * 8, 0),
    ([15] * 8, 0xFFFFFFFF),
]


def slow_word(codes: list[int]) -> int:
    """The word of eight codes, nibble by nibble."""
    return sum(codes[column] << (4 * nibble) for nibble, column in enumerate(ORDER))


@st.composite
def code_tensors(draw: st.DrawFn) -> torch.Tensor:
    rows, words = draw(st.integers(0, 4)), draw(st.integers(1, 4))
    row = st.lists(st.integers(0, 15), min_size=8 * words, max_size=8 * words)
    codes = draw(st.lists(row, min_size=rows, max_size=rows))
    return torch.tensor(codes, dtype=torch.uint8).reshape(rows, 8 * words)


@pytest.mark.parametrize(("codes", "word"), GOLDEN)
def test_golden_words(codes: list[int], word: int) -> None:
    row = torch.tensor([list(codes)], dtype=torch.uint8)
    packed = pack_columns(row)
    assert packed.dtype == torch.int32
    assert packed.item() & 0xFFFFFFFF == word
    assert torch.equal(unpack_columns(packed), row)


def test_the_worked_example_is_negative_as_int32() -> None:
    assert pack_columns(torch.arange(1, 9, dtype=torch.uint8)[None]).item() == -2042464975


@settings(max_examples=60, deadline=None)
@given(code_tensors())
def test_unpack_undoes_pack_and_words_are_the_slow_ones(codes: torch.Tensor) -> None:
    words = pack_columns(codes)
    assert words.shape == (codes.shape[0], codes.shape[1] // 8)
    assert words.is_contiguous()
    assert torch.equal(unpack_columns(words), codes)
    expected = [[slow_word(row[i : i + 8]) for i in range(0, len(row), 8)] for row in codes.tolist()]
    assert [[word & 0xFFFFFFFF for word in row] for row in words.tolist()] == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=9))
def test_pack_undoes_unpack(words: list[int]) -> None:
    column = torch.tensor(words, dtype=torch.int32)[:, None]
    assert torch.equal(pack_columns(unpack_columns(column)), column)


def test_strided_tensors_are_packed_by_their_values() -> None:
    codes = torch.randint(0, 16, (16, 5), dtype=torch.uint8).t()
    assert torch.equal(pack_columns(codes), pack_columns(codes.contiguous()))
    words = pack_columns(torch.randint(0, 16, (3, 16), dtype=torch.uint8)).t()
    assert torch.equal(unpack_columns(words), unpack_columns(words.contiguous()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_words_of_the_cpu() -> None:
    codes = torch.randint(0, 16, (33, 64), dtype=torch.uint8)
    words = pack_columns(codes.cuda())
    assert torch.equal(words.cpu(), pack_columns(codes))
    assert torch.equal(unpack_columns(words).cpu(), codes)


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        pack_columns(torch.zeros(2, 8, dtype=torch.int32))
    with pytest.raises(ValueError, match="multiple of 8"):
        pack_columns(torch.zeros(2, 9, dtype=torch.uint8))
    with pytest.raises(ValueError, match="a code is 16"):
        pack_columns(torch.full((1, 8), 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="expected int32"):
        unpack_columns(torch.zeros(2, 8, dtype=torch.int64))
