"""A real, small tokenizer built in memory: 128 word-level tokens, so that ids of the tiny models decode to text."""

from __future__ import annotations

import functools

from models import VOCABULARY
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are two-letter words: text of n tokens has 2n letters."""
    letters = [chr(ord("a") + index) for index in range(26)]
    words = ["<pad>", "<s>", *(first + second for first in letters for second in letters)][:VOCABULARY]
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = Split(Regex(r"[a-z]{2}"), "isolated")
    core.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", padding_side="left")
