"""Codes of 2, 3, 4 and 8 bits as one dense stream: code k lies at bit `bits` k, lowest bits first, in 32-bit words.

GPTQ, AutoRound and compressed-tensors all store this stream, along one axis or the other; the 3-bit pattern of GPTQ, in
which codes 10 and 21 of 32 straddle words, is this stream, too. Cost: the codes, one byte each, and the words.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

WIDTHS = (2, 3, 4, 8)


def word_count(count: int, bits: int) -> int:
    """Return how many 32-bit words hold `count` codes; the last may have bits to spare."""
    return -(-count * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return uint8 codes [rows, count], each below 2^bits, as int32 words [rows, words]."""
    rows, count = codes.shape
    words = word_count(count, bits)
    unit, size = _unit(bits)
    units = -(-words * 4 // size)
    padded = torch.zeros(rows, units * unit, dtype=torch.uint8, device=codes.device)
    padded[:, :count] = codes
    padded = padded.view(rows, units, unit)
    stream = torch.zeros(rows, units, size, dtype=torch.uint8, device=codes.device)
    for index in range(unit):
        byte, shift = divmod(index * bits, 8)
        stream[..., byte] |= padded[..., index] << shift
        if shift + bits > 8:
            stream[..., byte + 1] |= padded[..., index] >> (8 - shift)
    return _little(stream.view(rows, -1)[:, : 4 * words].contiguous()).view(torch.int32)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the uint8 codes [rows, count] of int32 words [rows, words]."""
    stream = _little(words.contiguous().view(torch.uint8))
    rows, total = stream.shape
    unit, size = _unit(bits)
    units = -(-total // size)
    if units * size != total:
        stream = torch.nn.functional.pad(stream, (0, units * size - total))
    stream = stream.view(rows, units, size)
    codes = torch.empty(rows, units, unit, dtype=torch.uint8, device=words.device)
    for index in range(unit):
        byte, shift = divmod(index * bits, 8)
        code = stream[..., byte] >> shift
        if shift + bits > 8:
            code = code | stream[..., byte + 1] << (8 - shift)
        codes[..., index] = code & ((1 << bits) - 1)
    return codes.view(rows, -1)[:, :count]


def _unit(bits: int) -> tuple[int, int]:
    """Return how many codes fill how many bytes without a rest."""
    length = math.lcm(bits, 8)
    return length // bits, length // 8


def _little(values: Tensor) -> Tensor:
    """Return the bytes of 32-bit words with the lowest first, whatever the order of bytes on this machine."""
    return values if sys.byteorder == "little" else values.view(len(values), -1, 4).flip(-1).reshape(len(values), -1)
