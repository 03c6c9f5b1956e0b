"""Codes of any width up to 8 bits as one dense little-endian stream in int32 words, as compressed-tensors packs them.

    element i of a row holds bits i·b .. i·b + b − 1;  bit p is bit p % 32 of word p // 32

An element may lie in two words; the idle bits at the end of a row are 0. Eight elements fill b bytes, so both
directions go byte by byte and nothing wider than a byte is ever held per code. Pure functions, on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CODES = 8  # that many codes of b bits are b whole bytes
_WORD_BITS, _WORD_BYTES = 32, 4


def stream_words(count: int, bits: int) -> int:
    """Words that a row of `count` codes takes."""
    return -(-count * bits // _WORD_BITS)


def padded_words(count: int, bits: int) -> int:
    """Words that a row of `count` codes takes where no code lies in two words, see `unpack_padded`."""
    return -(-count // (_WORD_BITS // bits))


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """Words `[rows, ceil(count · bits / 32)]` int32 of `codes` `[rows, count]` uint8.

    Raises ValueError for another dtype or rank, or a code that `bits` cannot hold.

    >>> hex(pack_stream(torch.arange(8, dtype=torch.uint8)[None], 4).item())
    '0x76543210'
    """
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(f"codes are {codes.dtype} {tuple(codes.shape)}, expected uint8 [rows, count]")
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"a code is {int(codes.max())}, {bits} bits hold 0 to {2**bits - 1}")
    rows, count = codes.shape
    groups, words = -(-count // _CODES), stream_words(count, bits)
    padded = torch.nn.functional.pad(codes, (0, groups * _CODES - count)).reshape(rows, groups, _CODES)
    packed = torch.zeros(rows, groups, bits, dtype=torch.uint8, device=codes.device)
    for element in range(_CODES):
        byte, shift = divmod(element * bits, 8)
        packed[..., byte] |= padded[..., element] << shift  # uint8: what lies above the byte is cut off
        if shift + bits > 8:
            packed[..., byte + 1] |= padded[..., element] >> (8 - shift)
    return _resized(packed.reshape(rows, groups * bits), words * _WORD_BYTES).view(torch.int32)


def unpack_stream(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes `[rows, count]` uint8 of `words` `[rows, ceil(count · bits / 32)]` int32; the inverse of `pack_stream`.

    Raises ValueError for another dtype or shape.
    """
    _refuse_words(words, stream_words(count, bits))
    rows, groups = words.shape[0], -(-count // _CODES)
    stored = (
        words.reshape(-1).view(torch.uint8).reshape(rows, _WORD_BYTES * words.shape[1])
    )  # a single column has strides that no view takes
    stream = _resized(stored, groups * bits).reshape(rows, groups, bits)
    codes = torch.empty(rows, groups, _CODES, dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for element in range(_CODES):
        byte, shift = divmod(element * bits, 8)
        value = stream[..., byte] >> shift
        if shift + bits > 8:
            value = value | stream[..., byte + 1] << (8 - shift)
        codes[..., element] = value & mask
    return codes.reshape(rows, groups * _CODES)[:, :count].contiguous()


def unpack_padded(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes `[rows, count]` uint8 of words that hold 32 // bits codes each, the top bits of each word idle.

    That is how compressed-tensors up to 0.17 packed 3, 5, 6 and 7 bits. Raises ValueError for another dtype or shape.
    """
    _refuse_words(words, padded_words(count, bits))
    shifts = torch.arange(_WORD_BITS // bits, dtype=torch.int32, device=words.device) * bits
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.to(torch.uint8).reshape(words.shape[0], -1)[:, :count].contiguous()


def _refuse_words(words: Tensor, expected: int) -> None:
    if words.dtype != torch.int32 or words.dim() != 2 or words.shape[1] != expected:
        raise ValueError(f"words are {words.dtype} {tuple(words.shape)}, expected int32 [rows, {expected}]")


def _resized(stream: Tensor, num_bytes: int) -> Tensor:
    """Rows cut, or filled with 0, to `num_bytes`, in memory of their own that can be viewed as words."""
    resized = torch.zeros(stream.shape[0], num_bytes, dtype=torch.uint8, device=stream.device)
    kept = min(num_bytes, stream.shape[1])
    resized[:, :kept] = stream[:, :kept]
    return resized
