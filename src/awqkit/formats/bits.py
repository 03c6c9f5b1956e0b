"""The int32 words of the AWQ layout: eight 4-bit codes of one row, interleaved.

    nibble j of word w (j = 0 least significant) holds column 8w + ORDER[j],  ORDER = 0 2 4 6 1 3 5 7

The kernels that read it unpack two columns at once, hence the order. Pure functions, on any device. The words
are handled as their four little-endian bytes, two codes each, so that nothing wider than a byte is ever held
per code.
"""

from __future__ import annotations

import torch
from torch import Tensor

CODES_PER_WORD = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_LOW, _HIGH = ORDER[0::2], ORDER[1::2]  # columns in the lower and the upper half of bytes 0 to 3


def pack_columns(codes: Tensor) -> Tensor:
    """Words `[rows, columns / 8]` int32 of `codes` `[rows, columns]` uint8 in 0 .. 15.

    Raises ValueError for another dtype, columns that no 8 divides, or a code above 15.

    >>> hex(pack_columns(torch.arange(8, dtype=torch.uint8)[None]).item())
    '0x75316420'
    """
    if codes.dtype != torch.uint8 or codes.dim() != 2 or codes.shape[1] % CODES_PER_WORD:
        raise ValueError(f"codes are {codes.dtype} {tuple(codes.shape)}, expected uint8 [rows, multiple of 8]")
    if codes.numel() and int(codes.max()) > 15:
        raise ValueError(f"a code is {int(codes.max())}, 4 bits hold 0 to 15")
    rows, columns = codes.shape
    # column 4i + 2j + k of a word is half j of byte 2k + i
    halves = codes.reshape(rows, columns // CODES_PER_WORD, 2, 2, 2)
    packed = halves[..., 0, :] | (halves[..., 1, :] << 4)
    return packed.transpose(-1, -2).reshape(rows, columns // 2).view(torch.int32)


def unpack_columns(words: Tensor) -> Tensor:
    """Codes `[rows, columns]` uint8 of `words` `[rows, columns / 8]` int32; the inverse of `pack_columns`.

    Raises ValueError for another dtype or rank.
    """
    if words.dtype != torch.int32 or words.dim() != 2:
        raise ValueError(f"words are {words.dtype} {tuple(words.shape)}, expected int32 [rows, columns / 8]")
    rows, num_words = words.shape
    packed = words.reshape(-1).view(torch.uint8).reshape(rows, num_words, 4)
    codes = torch.empty(rows, num_words, CODES_PER_WORD, dtype=torch.uint8, device=words.device)
    codes[..., _LOW] = packed & 15
    codes[..., _HIGH] = packed >> 4
    return codes.reshape(rows, num_words * CODES_PER_WORD)
