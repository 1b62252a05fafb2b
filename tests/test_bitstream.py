"""Codes of 2, 3, 4 and 8 bits in 32-bit words, against one large number cut into pieces."""

from __future__ import annotations

import pytest
import torch
from foreign_files import int32, stream

from hf_accel.quantization.files import bitstream


@pytest.mark.parametrize("count", [1, 10, 11, 31, 32, 33, 64, 96, 107])
@pytest.mark.parametrize("bits", bitstream.WIDTHS)
def test_the_stream_is_one_number_cut_into_words(bits: int, count: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, count), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
    words = bitstream.pack(codes, bits)
    assert torch.equal(words, int32([stream(row, bits) for row in codes.tolist()]))
    assert words.shape == (5, bitstream.word_count(count, bits))
    assert torch.equal(bitstream.unpack(words, bits, count), codes)


@pytest.mark.parametrize("bits", bitstream.WIDTHS)
def test_words_need_not_be_contiguous(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (32, 6), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    words = bitstream.pack(codes.T, bits).T
    assert torch.equal(bitstream.unpack(words.T, bits, 32), codes.T)


def test_three_bits_are_the_pattern_of_gptq() -> None:
    """10 codes, one over two words, 10, one over two words, 10: codes 10 and 21 straddle."""
    codes = list(range(8)) * 4
    words = [0, 0, 0]
    for index, code in enumerate(codes):
        if index == 10:
            words[0] |= (code & 3) << 30
            words[1] |= code >> 2
        elif index == 21:
            words[1] |= (code & 1) << 31
            words[2] |= code >> 1
        else:
            word, start, shift = (0, 0, 0) if index < 10 else (1, 11, 1) if index < 21 else (2, 22, 2)
            words[word] |= code << shift + 3 * (index - start)
    assert torch.equal(bitstream.pack(torch.tensor([codes], dtype=torch.uint8), 3), int32([words]))
