"""A tokenizer as the metadata of a GGUF file, compared by ids with what llama.cpp will make of them beforehand.

Two kinds are written: byte-level pairs (`gpt2`), under the name of their way to split text; and SentencePiece's pairs
(`llama`), which are merged by scores: their order of merges becomes scores, where every pair that makes a token is
one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from hf_accel.errors import UnsupportedModelError
from hf_accel.quantization.gguf.splitting import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Splitting,
    name_of,
    splitting_of,
    twin,
)

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_NORMALIZED = [{"type": "Prepend", "prepend": SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
SAMPLE = (
    "The quick brown fox, aged 42 (or 1,234.5), didn't jump; it'll RUN!  Three   spaces,\ttabs\t\tand\n\nlines.\r\n"
    "def f(x: int) -> str:\n    if x >= 10_000:\n        return f\"{x!r}\\n\"  # größer\n\n\n    return 'no'\n"
    "Ærøskøbing — “naïve” café, Ωμέγα, Москва, हिन्दी, 日本語のテキスト, 한국어, العربية, עברית. 😀👩‍👩‍👧 ½ ² € £ …\n"
    "https://example.org/a?b=c&d=%20#e  user@host  C:\\path\\to  a_b__c  XMLHttpRequest  iPhone12  3.14e-10  don’t\n"
    "   leading, trailing   \n\t\n \n x\n  y\n"
)
"""A text on which ways of splitting differ."""


def describe(tokenizer: Any, rows: int) -> dict[str, Any]:
    """Return key -> value of the metadata of a tokenizer, for a table of embeddings with `rows` rows.

    Raises:
        UnsupportedModelError: llama.cpp has no name for it, or would read other ids.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused(tokenizer, "it is not one of the tokenizers package, whose parts can be read")
    description = json.loads(backend.to_str())
    model = description["model"]
    if model["type"] != "BPE" or model.get("dropout") or model.get("continuing_subword_prefix"):
        raise _refused(tokenizer, f"its model is {model['type']}; pairs of bytes (BPE) are written")
    tokens, types = _tokens(tokenizer, model["vocab"], description["added_tokens"] or [], rows)
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    if model.get("byte_fallback"):
        found = _of_scores(tokenizer, description, tokens, types, merges)
    else:
        found = _of_bytes(tokenizer, description, merges)
    found |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    for kind, name in _SPECIAL.items():
        if (token := getattr(tokenizer, f"{kind}_token_id", None)) is not None:
            found[f"tokenizer.ggml.{name}_token_id"] = token
    found |= _ends(tokenizer)
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        found["tokenizer.chat_template"] = template
    _check(tokenizer, found)
    return found


def _refused(tokenizer: Any, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"This {type(tokenizer).__name__} cannot be written to a GGUF file: {reason}. Nothing was written. With "
        f"tokenizer=None "
        "the file holds the model alone, and programs must be given ids."
    )


def _tokens(
    tokenizer: Any, vocabulary: Mapping[str, int], added: list[dict[str, Any]], rows: int
) -> tuple[list[str], list[int]]:
    """Return the text and type of every id."""
    tokens = [f"[PAD{index}]" for index in range(rows)]
    types = [UNUSED] * rows
    places = {**vocabulary, **{token["content"]: token["id"] for token in added}}
    if len(places) > rows or max(places.values()) >= rows:
        raise _refused(tokenizer, f"it has {len(places)} tokens, the model's table {rows} rows")
    for token, index in places.items():
        tokens[index], types[index] = token, BYTE if _BYTE.fullmatch(token) else NORMAL
    for token in added:
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    if (unknown := getattr(tokenizer, "unk_token_id", None)) is not None:
        types[unknown] = UNKNOWN
    if len(set(tokens)) != rows:
        raise _refused(tokenizer, "two of its tokens have one text")
    return tokens, types


def _of_bytes(tokenizer: Any, description: Mapping[str, Any], merges: list[list[str]]) -> dict[str, Any]:
    normalizer = description["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":  # llama.cpp takes text to be in NFC
        raise _refused(tokenizer, f"it normalizes text by {normalizer['type']}, which llama.cpp does not")
    splitting = splitting_of(description)
    name = name_of(splitting) if isinstance(splitting, Splitting) else None
    if name is None:
        raise _refused(tokenizer, f"no table names its pre-tokenizer ({splitting})")
    joined = [" ".join(merge) for merge in merges]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.merges": joined}


def _of_scores(
    tokenizer: Any, description: Mapping[str, Any], tokens: list[str], types: list[int], merges: list[list[str]]
) -> dict[str, Any]:
    normalizer, splitter = description["normalizer"] or {}, description["pre_tokenizer"]
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    has_prefix = steps == _NORMALIZED
    is_metaspace = (
        not steps and splitter is not None and splitter["type"] == "Metaspace" and not splitter.get("split", True)
    )
    if is_metaspace and splitter["replacement"] == SPACE and splitter["prepend_scheme"] in ("first", "always", "never"):
        has_prefix = splitter["prepend_scheme"] != "never"
    elif not (steps in (_NORMALIZED, _NORMALIZED[1:]) and splitter is None):
        raise _refused(tokenizer, "its normalizer or pre-tokenizer is not SentencePiece's")
    scores, index = [0.0] * len(tokens), {token: place for place, token in enumerate(tokens)}
    latest, seen = "", set()
    for rank, (left, right) in enumerate(merges):
        if (made := left + right) != latest:
            if made in seen:
                raise _refused(
                    tokenizer, f"its merges that make {made!r} are not next to one another, so no score orders them"
                )
            seen.add(made)
            latest = made
            scores[index[made]] = -float(rank)
    known = {token for token, kind in zip(tokens, types) if kind in (NORMAL, USER_DEFINED)}
    pairs = {(left, right) for left, right in merges}
    for token in known:
        for at in range(1, len(token)):
            if token[:at] in known and token[at:] in known and (token[:at], token[at:]) not in pairs:
                raise _refused(tokenizer, f"{token[:at]!r} and {token[at:]!r} are no pair of it, but make a token")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": has_prefix,
    }


def _ends(tokenizer: Any) -> dict[str, bool]:
    """Return whether tokens of start and end go around a text."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a", add_special_tokens=True)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for starts in (False, True):
        for stops in (False, True):
            if full == [*([bos] if starts else []), *plain, *([eos] if stops else [])]:
                return {"tokenizer.ggml.add_bos_token": starts, "tokenizer.ggml.add_eos_token": stops}
    raise _refused(tokenizer, "it puts other tokens around a text than those of start and end")


def _check(tokenizer: Any, metadata: Mapping[str, Any]) -> None:
    """Compare ids on `SAMPLE` and on the texts of its tokens, as they follow one another in the vocabulary."""
    other = twin(metadata)
    count = len(metadata["tokenizer.ggml.tokens"])
    normal = [i for i, kind in enumerate(metadata["tokenizer.ggml.token_type"]) if kind == NORMAL]
    some = normal[:: max(1, count // 4096)]
    for text in (SAMPLE, tokenizer.decode(some), " ".join(tokenizer.decode([index]) for index in some)):
        ours = list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
        theirs = other.ids(text)
        if ours != theirs:
            at = next((i for i, (one, two) in enumerate(zip(ours, theirs)) if one != two), min(len(ours), len(theirs)))
            near = tokenizer.decode(ours[max(0, at - 3) : at + 3])
            raise _refused(tokenizer, f"what the file would say gives other ids than the tokenizer near {near!r}")
