"""Drafts from text seen before: against a twin that scans all of the text, across boundaries, tenants and threads."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_accel.speculative.drafters import suffixes as lookup
from hf_accel.speculative.drafters.suffixes import MAXIMUM_MATCH, SuffixIndex, TenantHistory

BOUNDARY = None
Text = Sequence[int | None]  # tokens and boundaries
ALL = 10**6


def built(text: Text, **options: int) -> SuffixIndex:
    """Return an index of the text, added in one piece per sequence."""
    index = SuffixIndex(**options)
    piece: list[int] = []
    for token in text:
        if token is None:
            index.extend(piece)
            index.separate()
            piece = []
        else:
            piece.append(token)
    index.extend(piece)
    return index


def match_length(text: Text, end: int, suffix: Text) -> int:
    length = 0
    while length < min(end, len(suffix), MAXIMUM_MATCH):
        token = text[end - 1 - length]
        if token is BOUNDARY or token != suffix[len(suffix) - 1 - length]:
            break
        length += 1
    return length


def twin(
    text: Text, suffix: Text | None, k: int, minimum: int = 2, candidates: int = 8, long: int = 6
) -> tuple[list[int], int]:
    """Scan the whole text, by the definition."""
    own = suffix is None
    suffix = text if suffix is None else suffix
    for least in (max(minimum, long), minimum):
        ends = [end for end in range(len(text) - 1, 0, -1) if match_length(text, end, suffix) >= least][:candidates]
        matches = [(end, match_length(text, end, suffix)) for end in ends if text[end] is not BOUNDARY]
        if not matches:
            continue
        longest = max(length for _, length in matches)
        near = [(end, length) for end, length in matches if 4 * length >= 3 * longest]
        votes = {text[end]: sum(n for e, n in near if text[e] == text[end]) for end, _ in near}
        most = max(votes.values())
        elected = next(text[end] for end, _ in near if votes[text[end]] == most)
        end, length = next(match for match in near if text[match[0]] == elected)
        drafts: list[int] = []
        for i in range(k):
            token = text[end + i] if end + i < len(text) else drafts[i - (len(text) - end)] if own else BOUNDARY
            if token is BOUNDARY:
                break
            drafts.append(token)
        return drafts, length
    return [], 0


@st.composite
def texts(draw: Callable) -> Text:
    """Phrases that return, and boundaries: matches of all lengths, loops and competing continuations."""
    dice = random.Random(draw(st.integers(0, 10**9)))
    tokens = range(dice.choice((2, 3, 8, 60)))
    phrases = [dice.choices(tokens, k=dice.randrange(1, 40)) for _ in range(dice.randrange(1, 6))]
    text: list[int | None] = []
    while len(text) < dice.randrange(1, 300):
        text += dice.choice(phrases)
        if dice.random() < 0.2:
            text += dice.choices(tokens, k=dice.randrange(1, 4))
        if dice.random() < 0.05 and text[-1] is not BOUNDARY:
            text.append(BOUNDARY)
    return text


@given(text=texts(), k=st.integers(1, 40), minimum=st.sampled_from([1, 2, 3, 6, 7, 32]))
@pytest.mark.parametrize("candidates", [1, 8, ALL])
def test_drafts_equal_those_of_a_scan(candidates: int, text: Text, k: int, minimum: int) -> None:
    index = built(text, minimum=minimum, candidates=candidates)
    assert index.propose(None, k) == twin(text, None, k, minimum, candidates)


@given(text=texts(), other=texts(), k=st.integers(1, 40), minimum=st.sampled_from([1, 2, 3, 8]))
@pytest.mark.parametrize("candidates", [1, 8, ALL])
def test_drafts_for_another_text_equal_those_of_a_scan(
    candidates: int, text: Text, other: Text, k: int, minimum: int
) -> None:
    index = built(text, minimum=minimum, candidates=candidates)
    at = random.Random(len(text)).randrange(len(text) + 1)
    for some in (other, text[:at]):
        suffix = [token for token in some if token is not BOUNDARY]
        expected = twin(text, suffix, k, minimum, candidates)
        assert index.propose(suffix, k) == expected
        assert index.propose(tuple(suffix), k) == expected


@given(text=texts(), k=st.integers(1, 20))
def test_with_all_candidates_no_match_is_longer(text: Text, k: int) -> None:
    """The match is at least three quarters of the longest, and an occurrence of exactly that length is continued."""
    drafts, length = built(text, candidates=ALL).propose(None, k)
    ends = [end for end in range(1, len(text)) if text[end] is not BOUNDARY]
    longest = max((match_length(text, end, text) for end in ends), default=0)
    assert (length == 0) == (longest < 2) == (not drafts)
    if drafts:
        assert 0.75 * longest <= length <= longest
        assert any(match_length(text, end, text) == length and text[end] == drafts[0] for end in ends)


def test_the_longest_match_wins() -> None:
    index = SuffixIndex()
    index.extend([9, 1, 2, 3, 4, 50, 8, 3, 4, 60, 7, 3, 4, 60, 9, 1, 2, 3, 4])
    assert index.propose(None, 3) == ([50, 8, 3], 5)


def test_of_equal_matches_the_more_frequent_token_wins_and_the_most_recent_occurrence_of_it_goes_on() -> None:
    index = SuffixIndex()
    index.extend([3, 4, 60, 1, 7, 3, 4, 60, 2, 8, 3, 4, 50, 9, 6, 3, 4])
    assert index.propose(None, 2) == ([60, 2], 2)
    index.extend([50, 5, 0, 3, 4])  # two each: the most recent
    assert index.propose(None, 2) == ([50, 5], 2)


def test_frequent_short_matches_do_not_hide_a_long_one() -> None:
    index = SuffixIndex(candidates=4)
    phrase = [11, 12, 13, 14, 1, 2]
    index.extend([*phrase, 99])
    for other in range(20, 60):
        index.extend([other, 1, 2, 77])
    index.extend(phrase)
    assert index.propose(None, 1) == ([99], 6)


@pytest.mark.parametrize("period", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("k", [1, 5, 16, 64])
def test_a_loop_is_drafted_on(period: int, k: int) -> None:
    index = SuffixIndex()
    text = [i % period for i in range(2 * period + 2)]
    index.extend(text)
    drafts, length = index.propose(None, k)
    assert drafts == [(len(text) + i) % period for i in range(k)]
    assert length >= 2


def test_another_text_is_not_continued_past_the_end() -> None:
    index = SuffixIndex()
    index.extend([1, 2, 3, 4])
    assert index.propose([7, 1, 2], 8) == ([3, 4], 2)
    assert index.propose([3, 4], 8) == ([], 0)
    assert index.propose([1, 2, 3, 4], 8) == ([], 0)


@pytest.mark.parametrize("suffix", [None, [], [1], [1, 2], [5, 6]])
def test_nothing_is_drafted_without_a_match(suffix: list[int] | None) -> None:
    index = SuffixIndex()
    assert index.propose(suffix, 8) == ([], 0)
    index.extend([])
    index.extend([2])
    assert index.propose(suffix, 8) == ([], 0)
    index.extend([3, 4, 3])
    assert index.propose(suffix, 8) == ([], 0)
    index.extend([2, 3, 4])
    assert index.propose(None, 0) == ([], 0)
    assert index.propose(None, -1) == ([], 0)


def test_a_boundary_ends_matches_and_drafts() -> None:
    index = SuffixIndex()
    index.extend([1, 2, 3, 4])
    index.separate()
    index.separate()
    index.extend([5, 6, 7])
    assert index.propose([4, 5], 4) == ([], 0)
    assert index.propose([2, 3], 4) == ([4], 2)
    assert index.propose([3, 4], 4) == ([], 0)
    assert index.propose([4, 5, 6], 4) == ([7], 2), "the match must not reach across"
    index.separate()
    assert index.propose(None, 4) == ([], 0)
    index.extend([5])
    assert index.propose(None, 4) == ([], 0)
    index.extend([6])
    assert index.propose(None, 4) == ([7], 2)


@given(text=texts())
def test_drafts_are_a_piece_of_one_sequence(text: Text) -> None:
    """Tokens of a sequence say which one it is: no draft mixes two of them."""
    number, marked = 0, []
    for token in text:
        number += token is BOUNDARY
        marked.append(BOUNDARY if token is BOUNDARY else 1000 * number + token)
    index = built(marked)
    for at in range(0, len(marked), 7):
        suffix = [token for token in marked[:at] if token is not BOUNDARY]
        drafts, _ = index.propose(suffix, 30)
        assert len({token // 1000 for token in [*suffix[-2:], *drafts]} if drafts else {0}) == 1


def test_a_sequence_of_its_own() -> None:
    index, expected = SuffixIndex(), SuffixIndex()
    index.extend([1, 2])
    index.add([3, 4, 5])
    index.add([])
    index.add([6])
    expected.extend([1, 2])
    for sequence in ([3, 4, 5], [6]):
        expected.separate()
        expected.extend(sequence)
    expected.separate()
    assert index._tokens == expected._tokens


@given(text=texts(), seed=st.integers(0, 10**6))
@pytest.mark.parametrize("max_tokens", [64, 65, 100, 65536])
def test_piece_by_piece_equals_at_once(max_tokens: int, text: Text, seed: int) -> None:
    dice, tokens = random.Random(seed), [token for token in text if token is not BOUNDARY] * 3
    whole, pieces, single = (SuffixIndex(max_tokens) for _ in range(3))
    whole.extend(tokens)
    at = 0
    while at < len(tokens):
        size = dice.randrange(90)
        pieces.extend(tokens[at : at + size])
        pieces.propose(None, 4)
        at += size
    for token in tokens:
        single.extend([token])
    for other in (pieces, single):
        assert other._tokens == whole._tokens
        assert [vars(chain) for chain in other._chains] == [vars(chain) for chain in whole._chains]


@given(text=texts(), k=st.integers(1, 20))
@pytest.mark.parametrize("max_tokens", [64, 101])
def test_what_is_forgotten_is_as_if_it_had_never_been(max_tokens: int, text: Text, k: int) -> None:
    tokens = [token for token in text if token is not BOUNDARY] * 4
    index = SuffixIndex(max_tokens)
    for start in range(0, len(tokens), 13):
        index.extend(tokens[start : start + 13])
        seen = tokens[: start + 13]
        kept = len(index._tokens)
        assert index._tokens == seen[len(seen) - kept :]
        assert kept == len(seen) or max_tokens // 2 <= kept <= max_tokens
        assert index.propose(None, k) == twin(index._tokens, None, k)
        suffix = seen[-40:-5]
        assert index.propose(suffix, k) == twin(index._tokens, suffix, k)


@pytest.mark.parametrize("piece", [1, 7, 1000, 40_000])
@pytest.mark.parametrize("vocabulary", [3, 10**5])
def test_memory_is_bounded(piece: int, vocabulary: int) -> None:
    maximum, dice = 2000, random.Random(0)
    index = SuffixIndex(maximum)
    for _ in range(0, 10 * maximum, piece):
        index.extend([dice.randrange(vocabulary) for _ in range(piece)])
        if piece == 7:
            index.separate()
        held = [index._tokens]
        for chain in index._chains:
            assert len(chain._newer) + len(chain._older) <= maximum
            assert len(chain._before) == len(index._tokens)
            held.append(chain._before)
        assert all(len(some) <= maximum for some in held)
    assert index._base >= 8 * maximum


def test_hashes_that_collide_are_no_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "hash", lambda key: sum(key) % 3, raising=False)
    for seed in range(30):
        text: Text = list(random.Random(seed).choices(range(4), k=60))
        assert built(text, candidates=ALL).propose(None, 9) == twin(text, None, 9, candidates=ALL)


@pytest.mark.parametrize("tokens", [[-1], [4, 5, -100, 6]])
def test_negative_tokens_are_refused(tokens: list[int]) -> None:
    """They mark boundaries inside."""
    index = SuffixIndex()
    index.extend([1, 2, 3])
    for refused in (index.extend, index.add, lambda given: index.propose(given, 4)):
        with pytest.raises(ValueError, match=f"token {min(tokens)} is negative"):
            refused(tokens)
    assert index._tokens == [1, 2, 3]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_tokens": 63}, "max_tokens must be at least 64, not 63"),
        ({"minimum": 0}, r"minimum must be in 1..32, not 0"),
        ({"minimum": 33}, r"minimum must be in 1..32, not 33"),
        ({"candidates": 0}, "candidates must be at least 1, not 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SuffixIndex(**options)


def test_a_history_refuses_them_too() -> None:
    with pytest.raises(ValueError, match="max_tokens must be at least 64"):
        TenantHistory(5)
    with pytest.raises(ValueError, match="tenants must be at least 1"):
        TenantHistory(100, tenants=0)


def test_tenants_find_nothing_of_each_other() -> None:
    history = TenantHistory(1000)
    secret = [1, 2, 3, 4, 5, 6, 7, 8]
    history.of("a").add(secret)
    assert history.of("a").propose(secret[:4], 4) == ([5, 6, 7, 8], 4)
    for tenant in ("b", "", "A", "a "):
        assert history.of(tenant).propose(secret[:4], 4) == ([], 0)
        history.of(tenant).extend([1, 2, 9])
        assert history.of(tenant).propose(secret[:2], 4) == ([9], 2)
    assert history.of("a").propose(secret[:4], 4) == ([5, 6, 7, 8], 4)
    assert history.of("a") is history.of("a")


def test_the_tenant_that_was_used_longest_ago_is_dropped() -> None:
    history = TenantHistory(1000, tenants=3)
    first = [history.of(tenant) for tenant in "abc"]
    assert history.of("a") is first[0]
    history.of("d")
    assert history.of("a") is first[0]
    assert history.of("c") is first[2]
    assert history.of("b") is not first[1]
    for number in range(200):
        history.of(str(number)).extend([1, 2, 3])
    assert len(history._indices) == 3
    assert history.of("a").propose([1, 2], 1) == ([], 0)


def together(work: Callable[[int], None], threads: int = 8) -> None:
    """Run work(0), work(1) ... at once, and raise what any of them raised."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(threads)

    def run(number: int) -> None:
        try:
            barrier.wait()
            work(number)
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_of_one_tenant_keep_sequences_whole() -> None:
    """Each thread's tokens say whose they are; the text forgets many times meanwhile."""
    history = TenantHistory(500)

    def work(number: int) -> None:
        sequence = [100 * number + i for i in range(30)]
        for at in range(200):
            index = history.of("shared")
            index.add(sequence)
            drafts, length = index.propose(sequence[: 5 + at % 20], 40)
            assert drafts in ([], sequence[5 + at % 20 :]), "sequences were mingled"
            assert (length == 0) == (not drafts)

    together(work)
    index = history.of("shared")
    assert all(len(chain._before) == len(index._tokens) for chain in index._chains)
    assert index.propose(None, 4) == ([], 0)


def test_threads_of_many_tenants_stay_apart() -> None:
    history = TenantHistory(200, tenants=4)

    def work(number: int) -> None:
        for at in range(300):
            own = 1000 * (number + 1)
            index = history.of(f"{number}-{at % 3}")
            index.add([1, 2, own, own + 1])
            assert index.propose([1, 2], 2) == ([own, own + 1], 2)

    together(work)
    assert len(history._indices) == 4
