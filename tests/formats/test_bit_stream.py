"""The dense bit stream: golden words, a slow obvious oracle, and unpack undoes pack; the older padded words too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from awqkit.formats.bit_stream import pack_stream, padded_words, stream_words, unpack_padded, unpack_stream

GOLDEN = [
    (4, range(1, 9), [0x87654321]),
    (3, [*range(8), 0, 1, 2, 3], [0x88FAC688, 0x00000006]),
    (8, [1, 2, 3, 255, 7], [0xFF030201, 0x00000007]),
    (2, [0, 1, 2, 3] * 4, [0xE4E4E4E4]),
    (1, [1, 0, 0, 0] * 8, [0x11111111]),
]
# What pack_to_int32 of compressed-tensors 0.17.0 made of codes 5·i mod 2^bits.
PADDED_GOLDEN = [
    (3, 12, [0x2878CEA8, 0x3A]),
    (3, 32, [0x2878CEA8, 0x3AA1E33A, 0x0CEA878C, 0x1E]),
    (5, 12, [0x3347A8A0, 0x2F26A07E]),
]


def slow_words(codes: list[int], bits: int) -> list[int]:
    """The words of a row, as one long integer cut into pieces."""
    stream = sum(code << (bits * index) for index, code in enumerate(codes))
    return [stream >> (32 * word) & 0xFFFFFFFF for word in range(stream_words(len(codes), bits))]


def unsigned(words: torch.Tensor) -> list[int]:
    return [word & 0xFFFFFFFF for word in words[0].tolist()]


def words_of(values: list[int]) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.int64).to(torch.int32)


@pytest.mark.parametrize(("bits", "codes", "words"), GOLDEN)
def test_golden_words(bits: int, codes: list[int], words: list[int]) -> None:
    packed = pack_stream(torch.tensor([list(codes)], dtype=torch.uint8), bits)
    assert unsigned(packed) == words


@st.composite
def rows_of_codes(draw: st.DrawFn) -> tuple[int, torch.Tensor]:
    bits, rows, count = draw(st.integers(1, 8)), draw(st.integers(0, 3)), draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return bits, torch.randint(0, 2**bits, (rows, count), generator=generator, dtype=torch.uint8)


@settings(max_examples=80, deadline=None)
@given(rows_of_codes())
def test_unpack_undoes_pack_and_the_words_are_those_of_the_oracle(case: tuple[int, torch.Tensor]) -> None:
    bits, codes = case
    words = pack_stream(codes, bits)
    assert words.dtype == torch.int32 and words.is_contiguous()
    assert torch.equal(unpack_stream(words, bits, codes.shape[1]), codes)
    for row, packed in zip(codes.tolist(), words, strict=True):
        assert unsigned(packed[None]) == slow_words(row, bits)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [5, 32, 40, 96])
def test_the_words_are_those_of_compressed_tensors(bits: int, count: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(0, 2**bits, (3, count), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    words = helpers.pack_to_int32(signed, bits)
    if words.shape[1] != stream_words(count, bits):
        pytest.skip("compressed-tensors before 0.18 pads 3, 5, 6 and 7 bits")
    assert torch.equal(pack_stream(codes, bits), words)
    assert torch.equal(unpack_stream(words, bits, count), codes)


@pytest.mark.parametrize(("bits", "count", "words"), PADDED_GOLDEN)
def test_the_padded_words_of_older_versions_are_read(bits: int, count: int, words: list[int]) -> None:
    assert padded_words(count, bits) == len(words)
    expected = [5 * index % 2**bits for index in range(count)]
    assert unpack_padded(words_of(words), bits, count).tolist() == [expected]


def test_a_transposed_tensor_is_packed_as_it_reads() -> None:
    codes = torch.arange(12, dtype=torch.uint8).reshape(3, 4)
    assert torch.equal(pack_stream(codes.t(), 4), pack_stream(codes.t().contiguous(), 4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_cuda_gives_the_words_of_the_cpu(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (33, 100), dtype=torch.uint8)
    words = pack_stream(codes.cuda(), bits)
    assert torch.equal(words.cpu(), pack_stream(codes, bits))
    assert torch.equal(unpack_stream(words, bits, 100).cpu(), codes)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="a code is 8, 3 bits hold 0 to 7"):
        pack_stream(torch.full((1, 4), 8, dtype=torch.uint8), 3)
    for wrong in (torch.zeros(4, dtype=torch.uint8), torch.zeros(1, 4, dtype=torch.int32)):
        with pytest.raises(ValueError, match="expected uint8"):
            pack_stream(wrong, 4)
    for unpack in (unpack_stream, unpack_padded):
        for wrong in (torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 1), torch.zeros(1, dtype=torch.int32)):
            with pytest.raises(ValueError, match="expected int32"):
                unpack(wrong, 4, 8)
