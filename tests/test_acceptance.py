"""Speculative sampling against a textbook in loops, by enumeration of everything it decides, and against counting."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_accel.ops.acceptance import accept, coupled, residual

V = 5
PROMPT = (0, 3)
BELOW_ONE = math.nextafter(1.0, 0.0)
PROCESSORS: dict[str, Callable[[], list]] = {
    "none": lambda: [],
    "temperature": lambda: [TemperatureLogitsWarper(0.6)],
    "top-k": lambda: [TopKLogitsWarper(3)],
    "top-p": lambda: [TopPLogitsWarper(0.7)],
    "min-p": lambda: [MinPLogitsWarper(0.3)],
    "repetition penalty": lambda: [RepetitionPenaltyLogitsProcessor(1.7)],
    "all": lambda: [
        RepetitionPenaltyLogitsProcessor(1.3),
        TemperatureLogitsWarper(1.4),
        TopKLogitsWarper(4),
        TopPLogitsWarper(0.9),
        MinPLogitsWarper(0.05),
    ],
}
Prefix = tuple[int, ...]
Joint = dict[Prefix, float]


class Chain:
    """A language model of five tokens: random logits for every prefix, through processors, as fp64 probabilities."""

    def __init__(self, seed: int, processors: str = "none", spread: float = 1.5) -> None:
        self.seed, self.spread = seed, spread
        self.processors = LogitsProcessorList(PROCESSORS[processors]())
        self.known: dict[Prefix, Tensor] = {}

    def __call__(self, prefix: Prefix) -> Tensor:
        if prefix not in self.known:
            number = int("".join(map(str, (self.seed + 1, *prefix))), 10)
            logits = torch.randn(1, V, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
            scores = self.processors(torch.tensor([[*PROMPT, *prefix]]), logits * self.spread)  # type: ignore[arg-type]
            self.known[prefix] = scores.softmax(-1)[0]
        return self.known[prefix]

    def rows(self, drafts: Prefix, count: int) -> Tensor:
        """Return the distributions after 0 .. count - 1 drafts [count, V]."""
        return torch.stack([self(drafts[:i]) for i in range(count)])

    def joint(self, length: int, prefix: Prefix = ()) -> Joint:
        """Return the probability of every continuation to `length` tokens."""
        found = {prefix: 1.0}
        while len(next(iter(found))) < length:
            found = {(*k, x): p * q for k, p in found.items() for x, q in enumerate(self(k).tolist()) if q > 0}
        return found


def variation(one: Joint, other: Joint) -> float:
    """Total variation distance."""
    return 0.5 * sum(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in {*one, *other})


def recorded(target: Tensor, drafts: Prefix, proposal: Tensor | None, uniforms: Sequence[float]) -> tuple[int, Tensor]:
    """Call the function as it is; return how many drafts it accepts and the distribution it draws one more from."""
    seen: list[Tensor] = []

    def draw(distribution: Tensor) -> int:
        seen.append(distribution)
        return 4

    emitted, count = accept(target, list(drafts), proposal, list(uniforms), draw)
    assert emitted == [*drafts[:count], 4]
    assert len(seen) == 1
    return count, seen[0]


def threshold(accepts: Callable[[float], bool]) -> float:
    """Return the measure of the uniforms that accept, all those below some number, by bisection of the decisions."""
    if not accepts(0.0):
        return 0.0
    if accepts(BELOW_ONE):
        return 1.0
    low, high = 0.0, 1.0
    while high - low > 1e-13:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if accepts(middle) else (low, middle)
    return low


def outcomes(
    target: Tensor, drafts: Prefix, proposal: Tensor | None, known: dict[Prefix, float]
) -> Iterator[tuple[Prefix, float]]:
    """Return everything that may be emitted for these drafts, and with which probability."""
    k, reached = len(drafts), 1.0
    for i in range(k + 1):
        if i < k and drafts[: i + 1] not in known:

            def accepts(u: float, i: int = i) -> bool:
                return recorded(target, drafts, proposal, [0.0] * i + [u] + [BELOW_ONE] * (k - i - 1))[0] > i

            known[drafts[: i + 1]] = threshold(accepts)
        rate = known[drafts[: i + 1]] if i < k else 0.0
        if rate < 1:
            uniforms = [0.0] * i + [BELOW_ONE] * (k - i)
            count, distribution = recorded(target, drafts, proposal, uniforms)
            assert count == i
            for token, weight in enumerate((distribution / distribution.sum()).tolist()):
                if weight > 0:
                    yield (*drafts[:i], token), reached * (1 - rate) * weight
        reached *= rate
        if reached == 0:
            return


def emitted_joint(target: Chain, drafter: Chain, k: int, deterministic: bool = False) -> Joint:
    """Return the distribution of the first k + 1 tokens, by enumeration; the target itself completes what is shorter.

    A deterministic drafter proposes its most probable token.
    """
    drafted = drafter.joint(k)
    if deterministic:
        greedy: Prefix = ()
        while len(greedy) < k:
            greedy = (*greedy, int(drafter(greedy).argmax()))
        drafted = {greedy: 1.0}
    found: Joint = {}
    known: dict[Prefix, float] = {}
    for drafts, probability in drafted.items():
        proposal = None if deterministic else drafter.rows(drafts, k)
        for emitted, share in outcomes(target.rows(drafts, k + 1), drafts, proposal, known):
            for text, rest in target.joint(k + 1, emitted).items():
                found[text] = found.get(text, 0.0) + probability * share * rest
    return found


@pytest.mark.parametrize("deterministic", [False, True], ids=["sampled", "deterministic"])
@pytest.mark.parametrize("processors", PROCESSORS)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_what_is_emitted_is_distributed_as_the_target(k: int, processors: str, deterministic: bool) -> None:
    """Exactly, for the joint distribution of k + 1 tokens, and hence of every prefix of them."""
    for seed in range(2 if k == 3 else 5):
        target, drafter = Chain(seed, processors), Chain(seed + 50, processors)
        found = emitted_joint(target, drafter, k, deterministic)
        assert sum(found.values()) == pytest.approx(1, abs=1e-10)
        assert variation(found, target.joint(k + 1)) < 1e-10


def test_a_drafter_without_the_processors_of_the_target_is_exact_too() -> None:
    for processors in PROCESSORS:
        target, drafter = Chain(1, processors), Chain(2)
        assert variation(emitted_joint(target, drafter, 2), target.joint(3)) < 1e-10
        target, drafter = Chain(1), Chain(2, processors)
        assert variation(emitted_joint(target, drafter, 2), target.joint(3)) < 1e-10


def test_a_drafter_that_equals_the_target_is_always_accepted() -> None:
    target = Chain(3)
    for drafts in itertools.product(range(V), repeat=2):
        rows = target.rows(drafts, 3)
        count, distribution = recorded(rows, drafts, rows[:2], [BELOW_ONE] * 2)
        assert count == 2
        assert torch.equal(distribution, rows[2])


def variant(decide: Callable, rest: Callable) -> Callable:
    """Return the algorithm with the decision and the distribution after a rejection exchanged."""

    def accept(
        target: Tensor, drafts: list[int], proposal: Tensor | None, uniforms: list[float], draw: Callable
    ) -> tuple[list[int], int]:
        for i, token in enumerate(drafts):
            q = torch.eye(V, dtype=target.dtype)[token] if proposal is None else proposal[i]
            if not decide(uniforms[i], float(target[i, token]), float(q[token])):
                return [*drafts[:i], draw(rest(target[i], q))], i
        return [*drafts, draw(target[len(drafts)])], len(drafts)

    return accept


def right_decision(u: float, p: float, q: float) -> bool:
    return u * q < p


def right_rest(p: Tensor, q: Tensor) -> Tensor:
    return (p - q).clamp(min=0)


DEFECTS = {
    "drawn from the target": variant(right_decision, lambda p, q: p),
    "drawn from the difference's size": variant(right_decision, lambda p, q: (p - q).abs()),
    "always accepted": variant(lambda u, p, q: True, right_rest),
    "accepted with p": variant(lambda u, p, q: u < p, right_rest),
    "accepted with q / p": variant(lambda u, p, q: u * p < q, right_rest),
    "accepted if more probable": variant(lambda u, p, q: p >= q, right_rest),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_enumeration_sees_defects(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter = Chain(0), Chain(50)
    monkeypatch.setitem(globals(), "accept", variant(right_decision, right_rest))
    assert variation(emitted_joint(target, drafter, 2), target.joint(3)) < 1e-10
    monkeypatch.setitem(globals(), "accept", DEFECTS[name])
    assert variation(emitted_joint(target, drafter, 2), target.joint(3)) > 0.05


def counted(function: Callable, target: Chain, drafter: Chain, seed: int, draws: int = 20_000) -> Joint:
    """Return how often each first pair of tokens was emitted, of k = 2 drafts and the target's completion."""
    dice = random.Random(seed)

    def draw(distribution: Tensor) -> int:
        return dice.choices(range(V), distribution.tolist())[0]

    seen: Counter[Prefix] = Counter()
    for _ in range(draws):
        first = draw(drafter(()))
        drafts = (first, draw(drafter((first,))))
        uniforms = [dice.random(), dice.random()]
        emitted, _ = function(target.rows(drafts, 3), list(drafts), drafter.rows(drafts, 2), uniforms, draw)
        if len(emitted) < 2:
            emitted.append(draw(target(tuple(emitted))))
        seen[tuple(emitted[:2])] += 1
    return {key: count / draws for key, count in seen.items()}


def test_counting_agrees_and_sees_a_draw_from_the_target_instead_of_the_residual() -> None:
    bound = 0.03  # 25 cells and 20,000 draws: expected 0.012
    target, drafter = Chain(0, "all"), Chain(50)
    assert variation(counted(accept, target, drafter, seed=1), target.joint(2)) < bound
    wrong = counted(DEFECTS["drawn from the target"], target, drafter, seed=1)
    assert variation(wrong, target.joint(2)) > 3 * bound


def textbook(
    target: list[list[float]], drafts: list[int], proposal: list[list[float]], uniforms: list[float]
) -> tuple[int, list[float]]:
    """Algorithm 1: the number of accepted drafts and the distribution of the next token, in loops."""
    n = 0
    for i, x in enumerate(drafts):
        if uniforms[i] > target[i][x] / proposal[i][x]:
            break
        n += 1
    p = list(target[n])
    if n < len(drafts):
        p = [max(0.0, p[v] - proposal[n][v]) for v in range(len(p))]
        p = [value / sum(p) for value in p]
    return n, p


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("vocabulary", [5, 333])
@pytest.mark.parametrize("deterministic", [False, True])
def test_equals_a_textbook_in_loops(dtype: torch.dtype, vocabulary: int, deterministic: bool) -> None:
    generator, dice = torch.Generator().manual_seed(0), random.Random(0)
    counts: Counter[bool] = Counter()
    for _ in range(200):
        k = dice.randrange(5)
        target = (torch.randn(k + 1, vocabulary, generator=generator) * 2).to(dtype).softmax(-1)
        proposal = (target[:k].log() + torch.randn(k, vocabulary, generator=generator)).softmax(-1)
        drafts = [int(row.argmax() if deterministic else row.multinomial(1, generator=generator)) for row in proposal]
        if deterministic:
            proposal = torch.nn.functional.one_hot(torch.tensor(drafts, dtype=torch.long), vocabulary).to(dtype)
        uniforms = [dice.random() for _ in range(k)]
        count, drawn = recorded(target, tuple(drafts), None if deterministic else proposal, uniforms)
        expected, distribution = textbook(target.tolist(), drafts, proposal.tolist(), uniforms)
        assert count == expected
        assert drawn.dtype == dtype
        assert torch.allclose(drawn, torch.tensor(distribution, dtype=dtype), atol=1e-6)
        counts[count == k] += 1
    assert min(counts[True], counts[False]) > 20


def test_no_drafts_is_plain_sampling() -> None:
    target = Chain(0).rows((), 1)
    for proposal in (None, target[:0]):
        count, distribution = recorded(target, (), proposal, [])
        assert count == 0
        assert torch.equal(distribution, target[0])


def test_drafts_of_probability_zero() -> None:
    target = torch.tensor([[0.0, 0.25, 0.75], [0.5, 0.5, 0.0]])
    proposal = torch.tensor([[1.0, 0.0, 0.0]])

    def decided(draft: int, u: float, proposal: Tensor | None) -> tuple[list[int], int]:
        return accept(target, [draft], proposal, [u], lambda p: int(p.argmax()))

    assert decided(0, 0.0, proposal) == ([2], 0)
    assert decided(0, 0.0, None) == ([2], 0)
    assert decided(1, BELOW_ONE, proposal) == ([1, 0], 1)
    assert accept(target, [0], torch.tensor([[0.0, 0.5, 0.5]]), [0.0], lambda p: int(p.argmax())) == ([2], 0)


def test_a_residual_that_is_zero_everywhere_is_the_target() -> None:
    p = torch.tensor([0.2, 0.3, 0.5])
    assert torch.equal(residual(p, p), p)
    assert torch.equal(residual(p, p + 1e-7), p)
    certain = torch.tensor([[0.0, 1.0 - 2**-24, 0.0]] * 2)  # fp32 rounds a probability of one
    assert accept(certain, [1], None, [BELOW_ONE], lambda p: int(p.argmax())) == ([1], 0)


def test_residual_is_normalised_and_leaves_its_arguments_alone() -> None:
    p, q = torch.tensor([0.1, 0.4, 0.5]), torch.tensor([0.5, 0.1, 0.4])
    assert torch.allclose(residual(p, q), torch.tensor([0.0, 0.75, 0.25]))
    target = torch.stack([p, p])
    recorded(target, (0,), None, [BELOW_ONE])
    assert torch.equal(target, torch.tensor([[0.1, 0.4, 0.5]] * 2))
    assert torch.equal(q, torch.tensor([0.5, 0.1, 0.4]))


@pytest.mark.parametrize(
    "rows, drafts, proposed, uniforms, message",
    [
        (2, [1, 1], None, [0.5, 0.5], r"2 drafts need a target \[3, V\]"),
        (3, [1, 1], (1, V), [0.5, 0.5], r"need a proposal \[2, 5\], not \[1, 5\]"),
        (3, [1, 1], (2, V + 1), [0.5, 0.5], r"need a proposal \[2, 5\], not \[2, 6\]"),
        (3, [1, 1], None, [0.5], "need 2 uniforms, not 1"),
        (2, [V], None, [0.5], "not in the vocabulary of 5"),
        (2, [-1], None, [0.5], "not in the vocabulary of 5"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    rows: int, drafts: list[int], proposed: tuple[int, int] | None, uniforms: list[float], message: str
) -> None:
    proposal = None if proposed is None else torch.full(proposed, 0.2)
    with pytest.raises(ValueError, match=message):
        accept(torch.full((rows, V), 0.2), drafts, proposal, uniforms, lambda p: 0)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("shape", [(1, 2), (1, 5), (7, 33), (3, 1000), (2, 32_000), (4, 50_000), (50_000,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_coupled_is_multinomial_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...], zeros: bool) -> None:
    for seed in range(10):
        torch.manual_seed(seed + 100)
        scores = torch.randn(shape, dtype=dtype) * 3
        if zeros:
            scores = scores.masked_fill(torch.rand(shape) < 0.9, -torch.inf)
            scores[..., -1] = 0
        probabilities = scores.softmax(-1)
        torch.manual_seed(seed)
        expected = torch.multinomial(probabilities, 1)[..., 0]
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        found = coupled(probabilities, torch.empty_like(probabilities).exponential_(1))
        assert torch.equal(found, expected)
        assert torch.equal(torch.get_rng_state(), after)
        assert bool((probabilities.gather(-1, found[..., None]) > 0).all())


def race(draws: int, seed: int) -> Tensor:
    return torch.empty(draws, V, dtype=torch.float64).exponential_(1, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("processors", PROCESSORS)
def test_the_marginal_of_coupled_is_right(processors: str) -> None:
    p = Chain(7, processors)(())
    counts = coupled(p.expand(20_000, V), race(20_000, 0)).bincount(minlength=V)
    assert 0.5 * float((counts / 20_000 - p).abs().sum()) < 0.015
    assert bool((counts[p == 0] == 0).all())
    weights = coupled((3 * p).expand(20_000, V), race(20_000, 0)).bincount(minlength=V)
    assert torch.equal(weights, counts), "weights that do not sum to one"


def test_coupled_drafts_are_accepted_as_often_as_proven() -> None:
    """Between (1 - TV) / (1 + TV) and the 1 - TV of the best coupling."""
    draws, spread = 40_000, []
    for seed in range(12):
        p, q = Chain(seed)(()), Chain(seed + 50, spread=0.5 + 0.2 * seed)(())
        exponentials = race(draws, seed)
        agreed = float((coupled(p.expand(draws, V), exponentials) == coupled(q.expand(draws, V), exponentials)).sum())
        distance = 0.5 * float((p - q).abs().sum())
        assert (1 - distance) / (1 + distance) - 0.01 < agreed / draws < 1 - distance + 0.01
        spread.append(distance)
    assert min(spread) < 0.35 < 0.6 < max(spread)


def test_independent_draws_agree_less_often() -> None:
    """The bound is not met by chance: drafts drawn with exponentials of their own fail it."""
    p, q = Chain(1, spread=0.5)(()), Chain(51, spread=0.5)(())
    distance = 0.5 * float((p - q).abs().sum())
    agreed = (coupled(p.expand(20_000, V), race(20_000, 0)) == coupled(q.expand(20_000, V), race(20_000, 1))).sum()
    assert float(agreed) / 20_000 < (1 - distance) / (1 + distance) - 0.1
