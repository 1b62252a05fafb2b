"""Drafts from text seen before: what followed the last time the text ended as it does now.

Prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding) with the longest match instead of the first
one and votes of several (as SuffixDecoding, Oliaro et al. 2024, arXiv:2411.04975, weighs by frequency), found by the
hash chains of deflate (RFC 1951, section 4) instead of a scan, and continued past the end of the text as LZ77 copies
overlapping matches.

Cost: to add a token, two dictionary entries; to draft, at most `candidates` comparisons of 32 tokens for each of two
lengths of n-grams, whatever the length of the text. Nothing is ever copied or rebuilt but half of a list of integers
when that half is forgotten.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

MAXIMUM_MATCH = 32  # tokens compared: a longer match is no better evidence
MINIMUM_TOKENS = 2 * MAXIMUM_MATCH  # of an index
_LONG = 6  # n-grams that are looked for first, so that frequent short ones do not hide long matches


class SuffixIndex:
    """A text of at most `max_tokens` tokens that drafts its own continuation, or that of another text.

    The oldest part is forgotten, half of `max_tokens` at a time. Any thread may call any method at any time.
    """

    def __init__(self, max_tokens: int = 65536, minimum: int = 2, candidates: int = 8) -> None:
        """`minimum`: tokens that must match; `candidates`: occurrences looked at, the most recent ones.

        Raises:
            ValueError: max_tokens is below 64, minimum is not in 1..32, or candidates is below 1.
        """
        if max_tokens < MINIMUM_TOKENS:
            raise ValueError(f"max_tokens must be at least {MINIMUM_TOKENS}, not {max_tokens}")
        if not 1 <= minimum <= MAXIMUM_MATCH:
            raise ValueError(f"minimum must be in 1..{MAXIMUM_MATCH}, not {minimum}")
        if candidates < 1:
            raise ValueError(f"candidates must be at least 1, not {candidates}")
        self.max_tokens, self.minimum, self.candidates = max_tokens, minimum, candidates
        self._half = max_tokens // 2
        self._tokens: list[int] = []
        self._base = 0  # tokens forgotten: the position of _tokens[0]
        self._boundaries = 0
        self._chains = [_Chain(n) for n in sorted({minimum, max(minimum, _LONG)}, reverse=True)]
        self._lock = threading.RLock()

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text.

        Raises:
            ValueError: a token is negative.
        """
        _check(tokens)
        with self._lock:
            self._append(tokens)

    def separate(self) -> None:
        """End a sequence: no match and no draft reaches from one side to the other."""
        with self._lock:
            if self._tokens and self._tokens[-1] >= 0:
                # a boundary is a negative number that occurs once, so that every comparison ends at it by itself
                self._boundaries += 1
                self._append([-self._boundaries])

    def add(self, sequence: Sequence[int]) -> None:
        """Append a sequence of its own, separated on both sides, in one step: threads cannot mingle theirs.

        Raises:
            ValueError: a token is negative.
        """
        _check(sequence)
        with self._lock:
            self.separate()
            self._append(sequence)
            self.separate()

    def propose(self, suffix: Sequence[int] | None, k: int) -> tuple[list[int], int]:
        """Return up to k tokens that followed an earlier occurrence of the suffix, and the length of the match.

        Among the most recent occurrences those that match about longest (three quarters of the longest, which is cut
        at 32 tokens) vote for the next token, each with its length; the most recent one with that token is continued.

        Args:
            suffix: its end is looked for; None for the end of this text, whose continuation is copied cyclically once
                it reaches the end of the text: a loop is drafted on.
            k: the drafts wanted. Fewer are returned at a boundary, and at the end of the text if a suffix is given.

        Raises:
            ValueError: one of the last 32 tokens of the suffix is negative.
        """
        if suffix is not None:
            suffix = suffix[-MAXIMUM_MATCH:]
            _check(suffix)
        with self._lock:
            tail = self._tokens[-MAXIMUM_MATCH:] if suffix is None else list(suffix)
            for chain in self._chains if k > 0 else ():
                if matches := self._matches(chain, tail):
                    start, length = self._elect(matches)
                    return self._continuation(start, k, cyclic=suffix is None), length
        return [], 0

    def _append(self, tokens: Sequence[int]) -> None:
        added = 0
        while added < len(tokens):
            first = len(self._tokens)
            if first and first % self._half == 0:
                self._begin_half()
                first = len(self._tokens)
            room = self._half - first % self._half
            self._tokens += tokens[added : added + room]
            added += len(self._tokens) - first
            for chain in self._chains:
                chain.extend(self._tokens, first, self._base)

    def _begin_half(self) -> None:
        """Make room for half of the tokens at most: if there are two halves, the older one is forgotten."""
        forgotten = self._half if len(self._tokens) > self._half else 0
        del self._tokens[:forgotten]
        self._base += forgotten
        for chain in self._chains:
            chain.begin_half(forgotten)

    def _matches(self, chain: _Chain, tail: list[int]) -> list[tuple[int, int]]:
        """Return where recent occurrences of the tail end (indices of _tokens) and how long they match, latest first.

        Those that nothing follows are left out: the end of the text, which is the tail itself or says nothing, and
        boundaries.
        """
        tokens, found = self._tokens, []
        for position in chain.walk(tail, self._base, self._base + len(tokens), self.candidates):
            end = position - self._base
            length = _common_suffix(tokens, end, tail)
            if length >= chain.n and tokens[end] >= 0:  # shorter: partly forgotten, or hashes that collide
                found.append((end, length))
        return found

    def _elect(self, matches: list[tuple[int, int]]) -> tuple[int, int]:
        least = 0.75 * max(length for _, length in matches)
        near = [match for match in matches if match[1] >= least]
        votes: dict[int, int] = {}
        for end, length in near:
            token = self._tokens[end]
            votes[token] = votes.get(token, 0) + length
        elected = max(votes, key=votes.__getitem__)  # of equal ones the most recent, which was inserted first
        return next(match for match in near if self._tokens[match[0]] == elected)

    def _continuation(self, start: int, k: int, cyclic: bool) -> list[int]:
        drafts = self._tokens[start : start + k]
        if min(drafts) < 0:
            return drafts[: next(i for i, token in enumerate(drafts) if token < 0)]
        if cyclic and len(drafts) < k:
            drafts = (drafts * (k // len(drafts) + 1))[:k]
        return drafts


class TenantHistory:
    """One `SuffixIndex` of at most `max_tokens` tokens per tenant, of the `tenants` that were used last.

    Indices share nothing, so that no tenant is ever shown what another wrote: not even by how fast its text comes.
    Any thread may call any method at any time. An index that was dropped works on for those that still hold it.
    """

    def __init__(self, max_tokens: int = 65536, tenants: int = 64) -> None:
        """`max_tokens` of each tenant, and the number of tenants.

        Raises:
            ValueError: max_tokens is below 64, or tenants is below 1.
        """
        if tenants < 1:
            raise ValueError(f"tenants must be at least 1, not {tenants}")
        SuffixIndex(max_tokens)  # refuse a wrong size here, not at the first call
        self.max_tokens, self.tenants = max_tokens, tenants
        self._indices: OrderedDict[str, SuffixIndex] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, tenant: str) -> SuffixIndex:
        """Return the index of a tenant, an empty one if it is new or was dropped."""
        with self._lock:
            index = self._indices.get(tenant)
            if index is None:
                index = self._indices[tenant] = SuffixIndex(self.max_tokens)
                if len(self._indices) > self.tenants:
                    self._indices.popitem(last=False)
            self._indices.move_to_end(tenant)
            return index


class _Chain:
    """Where each n-gram ended last, and for every position where the same n-gram had ended before.

    Positions count from the beginning of all text; one is the number of tokens up to the end of the n-gram. N-grams are
    known by their hash, which takes a third of the memory of a tuple: who follows a chain compares tokens anyway.
    Entries are in two generations and the older one is dropped as a whole, so that forgetting never walks over them.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self._newer: dict[int, int] = {}
        self._older: dict[int, int] = {}
        self._before: list[int] = []  # of the n-gram that ends with the token of the same index; -1: none

    def extend(self, tokens: list[int], first: int, base: int) -> None:
        """Enter the n-grams that end with tokens[first:]; base is the position of tokens[0]."""
        n, newer, older, before = self.n, self._newer, self._older, self._before
        whole = max(first, n - 1)  # the very first tokens of a text end no n-gram
        before += [-1] * (min(whole, len(tokens)) - first)
        windows = zip(*(tokens[whole - n + 1 + i : len(tokens) - n + 1 + i] for i in range(n)))
        for position, key in enumerate(map(hash, windows), base + whole + 1):
            last = newer.get(key)
            before.append(older.get(key, -1) if last is None else last)
            newer[key] = position

    def begin_half(self, forgotten: int) -> None:
        """Begin a generation, and forget the first tokens, which are all or none of the older one."""
        del self._before[:forgotten]
        self._older, self._newer = self._newer, {}

    def walk(self, tail: list[int], base: int, end: int, limit: int) -> list[int]:
        """Return up to `limit` ends of the n-gram that ends the tail, from base + 1 to end - 1, latest first."""
        if len(tail) < self.n:
            return []
        key = hash(tuple(tail[-self.n :]))
        position = self._newer.get(key, -1)
        if position < 0:
            position = self._older.get(key, -1)
        found: list[int] = []
        while position > base and len(found) < limit:
            if position < end:
                found.append(position)
            position = self._before[position - base - 1]
        return found


def _common_suffix(tokens: list[int], end: int, tail: list[int]) -> int:
    """Return how many tokens the ends of tokens[:end] and of the tail have in common."""
    size = min(end, len(tail))
    if tokens[end - size : end] == tail[len(tail) - size :]:
        return size
    length = 0
    while tokens[end - 1 - length] == tail[-1 - length]:  # ends: the slices differ
        length += 1
    return length


def _check(tokens: Sequence[int]) -> None:
    if tokens and min(tokens) < 0:
        raise ValueError(f"token {min(tokens)} is negative")
