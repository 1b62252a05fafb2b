"""How text is split before pairs are merged: what llama.cpp calls each way, and a tokenizer that does as a file says.

llama.cpp knows a tokenizer by a name (`tokenizer.ggml.pre`) to which its code has the patterns (src/llama-vocab.cpp). A
wrong name gives fluent, subtly wrong text. So a tokenizer is only written under a name whose patterns are its own, and
`twin` tokenizes as the file will say it, to be compared by ids.
"""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens, as files number them."""


@dataclass(frozen=True)
class Splitting:
    """patterns: applied one after the other; ignores_merges: a whole piece that is a token is one, merges or not."""

    patterns: tuple[str, ...]
    ignores_merges: bool = False


SPLITTINGS = {
    "gpt-2": Splitting((GPT2,)),
    "smollm": Splitting((r"\p{N}", GPT2)),
    "llama-bpe": Splitting((_LLAMA3,), ignores_merges=True),
    "qwen2": Splitting((_QWEN2,)),
    "tekken": Splitting((_TEKKEN,), ignores_merges=True),
}
"""Name in files -> how llama.cpp splits."""


def splitting_of(description: Mapping[str, Any]) -> Splitting | str:
    """Return how a byte-level tokenizer splits text, of its tokenizer.json; or why that is not one of our kinds.

    A split at line ends in front of other patterns changes nothing where no token goes across one: it is left out.
    """
    part = description["pre_tokenizer"] or {}
    steps = part.get("pretokenizers", [part]) if part.get("type") == "Sequence" else [part]
    patterns: list[str] = []
    for index, step in enumerate(steps):
        if step.get("type") == "ByteLevel" and index == len(steps) - 1 and not step["add_prefix_space"]:
            patterns += [GPT2] if step.get("use_regex", True) else []
            return Splitting(tuple(patterns), bool(description["model"].get("ignore_merges")))
        if step.get("type") == "Digits" and step["individual_digits"]:
            patterns.append(r"\p{N}")
        elif step.get("type") == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            pattern = step["pattern"]
            if pattern != {"String": "\n"} or _crosses_lines(description["model"]["vocab"]):
                patterns.append(pattern.get("Regex", pattern.get("String")))
        else:
            return f"its pre-tokenizer has a step {json.dumps(step)}"
    return "its pre-tokenizer does not end in bytes"


def name_of(splitting: Splitting) -> str | None:
    """Return what files call a way of splitting, None where llama.cpp has no name for it here."""
    return next((name for name, known in SPLITTINGS.items() if known == splitting), None)


def _crosses_lines(vocabulary: Mapping[str, int]) -> bool:
    line_end = "\u010a"  # the newline in the alphabet of bytes
    return any(line_end in token and token != line_end for token in vocabulary)


class ByteTwin:
    """Tokenizes as llama.cpp does with the metadata of a file with byte-level pairs."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
        splitting = SPLITTINGS[metadata["tokenizer.ggml.pre"]]
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        model = models.BPE(vocabulary, merges, ignore_merges=splitting.ignores_merges)  # type: ignore[arg-type]
        self.tokenizer = Tokenizer(model)
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in splitting.patterns]
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        self.tokenizer.decoder = decoders.ByteLevel()
        self.tokenizer.add_special_tokens(
            [AddedToken(t, normalized=False) for t, k in zip(tokens, types) if k == CONTROL]
        )
        self.tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, types) if k == USER_DEFINED])

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text, without tokens of start and end."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


class ScoreTwin:
    """Tokenizes as llama.cpp does with the metadata of a file whose pairs are merged by scores, as SentencePiece's."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.tokens: list[str] = metadata["tokenizer.ggml.tokens"]
        self.scores: list[float] = metadata["tokenizer.ggml.scores"]
        types = metadata["tokenizer.ggml.token_type"]
        self.index = {token: i for i, token in enumerate(self.tokens) if types[i] in (NORMAL, USER_DEFINED)}
        whole = sorted((t for t, kind in zip(self.tokens, types) if kind == USER_DEFINED), key=len, reverse=True)
        self.whole = re.compile(f"({'|'.join(map(re.escape, whole))})") if whole else None
        self.bytes = {int(token[3:5], 16): i for i, token in enumerate(self.tokens) if types[i] == BYTE}
        self.unknown = metadata.get("tokenizer.ggml.unknown_token_id")
        self.prefix = SPACE if metadata["tokenizer.ggml.add_space_prefix"] else ""

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text, without tokens of start and end."""
        pieces = [text] if self.whole is None else self.whole.split(text)  # at odd places tokens that are taken whole
        found: list[int] = []
        for place, piece in enumerate(pieces):
            if piece:
                found += [self.index[piece]] if place % 2 else self._merged(piece)
        return found

    def _merged(self, text: str) -> list[int]:
        parts: list[str | None] = list(self.prefix + text.replace(" ", SPACE))
        after = [*range(1, len(parts)), -1]
        before = list(range(-1, len(parts) - 1))
        queue: list[tuple[float, int, int, str]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right >= 0:
                joined = f"{parts[left]}{parts[right]}"
                if joined in self.index:
                    heapq.heappush(queue, (-self.scores[self.index[joined]], left, right, joined))

        for i in range(len(parts) - 1):
            offer(i, i + 1)
        while queue:
            _, left, right, joined = heapq.heappop(queue)
            if parts[left] is None or parts[right] is None or f"{parts[left]}{parts[right]}" != joined:
                continue
            parts[left], parts[right] = joined, None
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            offer(before[left], left)
            offer(left, after[left])
        return [found for part in parts if part is not None for found in self._ids_of(part)]

    def _ids_of(self, part: str) -> list[int | Any]:
        if part in self.index:
            return [self.index[part]]
        if all(byte in self.bytes for byte in part.encode()):
            return [self.bytes[byte] for byte in part.encode()]
        return [self.unknown]


def twin(metadata: Mapping[str, Any]) -> ByteTwin | ScoreTwin:
    """Return a tokenizer that does as the metadata of a file say."""
    return ByteTwin(metadata) if metadata["tokenizer.ggml.model"] == "gpt2" else ScoreTwin(metadata)
