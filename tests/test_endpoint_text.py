"""Text that is put together as it comes equals what decoding all tokens gives; stop strings equal a textbook's."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from hf_accel.endpoint.alternatives import token_bytes
from hf_accel.endpoint.choices import Choice
from hf_accel.endpoint.detokenizing import Detokenizer
from hf_accel.endpoint.stopping import StopText

WORDS = tokenizer()
TEXTS = ["naïve ∑ 🙂 café\n\t日本語", "x = 'é' # 🙂🙂\n", "plain words, and no more", "👩‍👩‍👧 e\u0301 \ufffd end"]


def metaspace() -> Any:
    """A tokenizer of the kind that begins a text without its space and has bytes for what it has no pieces for."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁end", "a", "b", "ing", "."]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    found = Tokenizer(models.BPE({piece: place for place, piece in enumerate(pieces)}, [], byte_fallback=True))
    found.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=found)


def joined(words: Any, tokens: list[int], before: list[int] | None = None) -> tuple[str, list[str]]:
    text = Detokenizer(words, before)
    parts = [text.add(token) for token in tokens]
    return "".join([*parts, text.finish()]), parts


@given(st.lists(st.integers(0, len(WORDS) - 1), max_size=40))
def test_any_tokens_are_decoded_as_all_at_once(tokens: list[int]) -> None:
    assert joined(WORDS, tokens)[0] == WORDS.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("text", TEXTS)
def test_no_part_of_a_character_is_shown(text: str) -> None:
    tokens = WORDS(text)["input_ids"]
    found, parts = joined(WORDS, tokens)
    assert found == text
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)
    assert all(text.startswith("".join(parts[:count])) for count in range(len(parts)))
    code = [token_bytes(WORDS, token) for token in tokens]
    assert b"".join(bytes(part) for part in code if part is not None).decode() == text
    assert None not in code


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_goes_on_behind_its_prompt(text: str) -> None:
    tokens = WORDS("def f(x):" + text)["input_ids"]
    for cut in range(1, len(tokens)):
        prompt = WORDS.decode(tokens[:cut])
        if not prompt.endswith("\ufffd"):
            assert prompt + joined(WORDS, tokens[cut:], tokens[max(0, cut - 4) : cut])[0] == WORDS.decode(tokens)


def test_spaces_and_bytes_of_other_tokenizers() -> None:
    words = metaspace()
    ids = words.convert_tokens_to_ids
    tokens = ids(["▁the", "▁end", "ing", "▁", "<0xE2>", "<0x88>", "<0x91>", "a", "▁the", "<0xC3>", "<0xA9>", "."])
    assert joined(words, tokens)[0] == words.decode(tokens) == "the ending ∑a theé."
    assert joined(words, tokens)[1][:3] == ["the", " end", "ing"]
    assert joined(words, tokens, ids(["a", "b"]))[0] == " the ending ∑a theé."
    assert [token_bytes(words, token) for token in tokens[4:7]] == [[0xE2], [0x88], [0x91]]


def test_bytes_that_never_become_a_character_are_shown_at_the_end() -> None:
    words = metaspace()
    tokens = words.convert_tokens_to_ids(["a", "<0xE2>", "<0x88>"])
    assert joined(words, tokens)[0] == words.decode(tokens) == "a\ufffd\ufffd"
    assert joined(words, tokens)[1] == ["a", "", ""]


def textbook(text: str, stops: list[str]) -> tuple[str, bool]:
    """Return a text before its first stop string, looking for one after each character."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))], True
    return text, False


LETTERS = st.text("abé", max_size=12)


@given(st.lists(LETTERS, max_size=6), st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
def test_stop_strings_equal_a_textbook_however_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    stop, shown = StopText(tuple(stops)), ""
    expected, is_found = textbook("".join(pieces), stops)
    for piece in pieces:
        shown += stop.add(piece)
        assert expected.startswith(shown), "more was shown than is before the stop string"
        if stop.is_found:
            break
    shown += "" if stop.is_found else stop.finish()
    assert (shown, stop.is_found) == (expected, is_found)


def test_text_is_held_back_no_longer_than_it_may_be_a_stop_string() -> None:
    stop = StopText(("aab",))
    assert [stop.add(piece) for piece in ("xa", "a", "a", "c", "a")] == ["x", "", "a", "aac", ""]
    assert stop.finish() == "a"


@given(st.lists(st.integers(2, len(WORDS) - 1), min_size=1, max_size=20), st.lists(LETTERS.filter(bool), max_size=2))
def test_a_choice_is_its_text_up_to_its_end(tokens: list[int], stops: list[str]) -> None:
    most = len(tokens)
    choice = Choice(0, WORDS, [], tuple(stops), {WORDS.eos_token_id}, most)
    pieces = [piece for token in [*tokens, 5, 5] if (piece := choice.take(token)) is not None]
    expected, is_found = textbook(WORDS.decode(tokens), stops)
    assert "".join(piece.text for piece in pieces) == expected
    assert [piece.finish for piece in pieces if piece.finish] == ["stop" if is_found else "length"]
    assert choice.tokens <= most
