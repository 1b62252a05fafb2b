"""The parts of a conversion against what textbooks and brute force say."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import heads as tiny
import pytest
import torch
from gqa_twins import rows
from models import build
from torch import Tensor

from hf_accel.errors import ConfigError
from hf_accel.gqa import repair
from hf_accel.gqa.alignment import Seen, aligned, pooled
from hf_accel.gqa.converting import BATCH, _seen
from hf_accel.gqa.grouping import balanced, neighbours
from hf_accel.gqa.heads import Heads, attention_layers, read_heads
from hf_accel.gqa.maps import Freedom, found_maps
from hf_accel.gqa.repair import Task
from hf_accel.gqa.running import Read, Runnable, recorded
from hf_accel.gqa.sensitivity import SHARE, key_costs
from hf_accel.gqa.stacks import Stack


def normal(*shape: int, seed: int = 0, kind: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=kind)


def positive(*batch: int, size: int, seed: int, kind: torch.dtype = torch.float64) -> Tensor:
    """Return positive definite matrices [*batch, size, size]."""
    root = normal(*batch, size, size, seed=seed, kind=kind)
    return root @ root.mH + 0.1 * torch.eye(size, dtype=kind)


def root_of(matrix: Tensor) -> Tensor:
    """Return an upper triangular root: matrix = root^H root."""
    return torch.linalg.cholesky(matrix).mH


@pytest.mark.parametrize("kind", [torch.float64, torch.complex128], ids=["real", "complex"])
@pytest.mark.parametrize("group", [(0, 1), (2, 0, 3), (1, 2, 3, 4)], ids=str)
def test_what_is_lost_is_what_singular_values_say(group: tuple[int, ...], kind: torch.dtype) -> None:
    """Rows weighed by the metric's root, inputs by the moment's: the best approximation of the stack by rank r."""
    parts, heads, size, width = 3, 5, 2, 11
    own, metric = normal(parts, heads, size, width, kind=kind), positive(parts, heads, size=size, seed=1, kind=kind)
    moment = positive(size=width, seed=2)
    stack = Stack(own, metric, moment)
    left = torch.linalg.cholesky(moment).to(kind)
    expected, shared = 0.0, stack.shared(group)
    for part in range(parts):
        tall = torch.cat([root_of(metric[part, h]) @ own[part, h] @ left for h in group])
        expected += float(torch.linalg.svdvals(tall)[size:].square().sum())
        made = [shared.factors[part, n] @ shared.rows[part] for n in range(len(group))]
        off = [made[n] - own[part, h] for n, h in enumerate(group)]
        found = sum(
            torch.einsum("ax,ab,by,xy->", e.conj(), metric[part, h], e, moment.to(kind)).real
            for e, h in zip(off, group, strict=True)
        )
        best = float(torch.linalg.svdvals(tall)[size:].square().sum())
        assert float(found) == pytest.approx(best, rel=1e-8)
    assert stack.lost(group) == pytest.approx(expected, rel=1e-8)


def test_shared_rows_are_as_large_as_those_they_stand_for() -> None:
    own = normal(2, 4, 3, 9) * torch.tensor([1e-6, 1e3])[:, None, None, None]
    stack = Stack(own, positive(2, 4, size=3, seed=1), positive(size=9, seed=2))
    found = stack.shared((0, 2, 3)).rows
    for part in range(2):
        assert float(found[part].square().mean()) == pytest.approx(float(own[part, [0, 2, 3]].square().mean()))


def test_a_head_that_costs_nothing_changes_nothing() -> None:
    """A metric of zeros, and heads of zeros: no division by them, and the others are kept as they are."""
    own, metric = normal(1, 3, 2, 9), positive(1, 3, size=2, seed=1)
    metric[0, 1] = 0
    stack = Stack(own, metric, positive(size=9, seed=2))
    assert stack.lost((0, 1)) == pytest.approx(0, abs=1e-10)
    found = stack.shared((0, 1))
    torch.testing.assert_close(found.factors[0, 0] @ found.rows[0], own[0, 0])
    assert bool(found.factors.isfinite().all())
    empty = Stack(torch.zeros_like(own), metric, positive(size=9, seed=2)).shared((0, 1, 2))
    assert bool(empty.rows.isfinite().all() & empty.factors.isfinite().all())


RIGID = [Freedom.TURNS, Freedom.SIGNS, Freedom.NONE]


@pytest.mark.parametrize("freedom", RIGID, ids=lambda freedom: freedom.name)
def test_rigid_factors_take_a_disguise_off(freedom: Freedom) -> None:
    """Rows that are one row times numbers of modulus one lose nothing and are found; more than is free is lost."""
    base, angles = normal(2, 9, kind=torch.complex128), 6.283 * torch.rand(2, 4, dtype=torch.float64)
    turns = torch.polar(torch.ones_like(angles), angles)
    signs = torch.tensor([[1, -1, -1, 1], [-1, -1, 1, -1]]).to(turns)
    given = {Freedom.TURNS: turns, Freedom.SIGNS: signs, Freedom.NONE: torch.ones_like(signs)}
    metric, moment = torch.ones(2, 4, 1, 1, dtype=torch.complex128), positive(size=9, seed=3)
    for allowed in RIGID:
        own = (given[allowed][..., None] * base[:, None])[:, :, None]
        stack = Stack(own, metric, moment, freedom=freedom)
        is_free = RIGID.index(freedom) <= RIGID.index(allowed)
        assert (stack.lost((0, 1, 2, 3)) < 1e-8) == is_free
        if is_free:
            found = stack.shared((0, 1, 2, 3))
            torch.testing.assert_close(found.factors[..., 0] * found.rows, own[:, :, 0])


@pytest.mark.parametrize("freedom", RIGID, ids=lambda freedom: freedom.name)
def test_rigid_losses_are_those_of_the_mean_row(freedom: Freedom) -> None:
    """What is lost is the spread of rows about their mean, after they were turned into each other."""
    own = normal(3, 4, 1, 9, kind=torch.complex128)
    moment = positive(size=9, seed=3)
    stack = Stack(own, torch.ones(3, 4, 1, 1, dtype=torch.complex128), moment, freedom=freedom)
    group = (3, 0, 2)
    factors = stack.shared(group).factors[..., 0]  # [P, n, 1]
    turned = factors.conj() * own[:, group, 0]
    spread = turned - turned.mean(1, keepdim=True)
    expected = torch.einsum("pnx,xy,pny->", spread.conj(), moment.to(spread), spread).real
    assert stack.lost(group) == pytest.approx(float(expected), rel=1e-8)
    torch.testing.assert_close(factors.abs(), torch.ones_like(factors.abs()))


def test_signs_are_the_best_of_all_signs_for_two_heads() -> None:
    own = normal(6, 2, 1, 9, kind=torch.complex128)
    moment = positive(size=9, seed=3)
    stack = Stack(own, torch.ones(6, 2, 1, 1, dtype=torch.complex128), moment, freedom=Freedom.SIGNS)
    found = stack.shared((0, 1)).factors[:, 1, 0, 0].real
    scores = torch.einsum("px,xy,py->p", own[:, 0, 0].conj(), moment.to(own), own[:, 1, 0]).real
    assert torch.equal(found.sign(), scores.sign())


@pytest.mark.parametrize("method", ["mean", "first"])
@pytest.mark.parametrize("name, kv_heads", [("gpt2", 2), ("gpt2", 1), ("qwen2", 1), ("llama", 1)])
def test_pooling_is_that_of_ainslie(name: str, kv_heads: int, method: str) -> None:
    """Section 2.1: the projection matrices of the heads of a group are mean-pooled, or the first of them is taken."""
    model = build(name)
    heads = read_heads(attention_layers(model)[0], model.config)
    found = pooled(heads, kv_heads, method)
    each = len(heads.k) // kv_heads
    for part in ("k", "v", "k_bias", "v_bias"):
        old, new = getattr(heads, part), getattr(found, part)
        assert (old is None) == (new is None)
        for group in range(kv_heads if old is not None else 0):
            members = [old[group * each + i] for i in range(each)]
            expected = sum(members[1:], members[0]) / each if method == "mean" else members[0]
            torch.testing.assert_close(new[group], expected)
    assert found.q is heads.q
    assert found.o is heads.o


def random_cost(heads: int, seed: int) -> tuple[Callable[[tuple[int, ...]], float], Tensor]:
    """Return costs of groups: of their pairs, which are returned, and something of each group's own."""
    pairs = torch.rand(heads, heads, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pairs = pairs + pairs.T

    def cost(group: tuple[int, ...]) -> float:
        assert list(group) == sorted(set(group)), "a group is told by its heads in order"
        own = math.sin(sum((head + 1) ** 2 for head in group) + seed)
        return float(sum(pairs[a, b] for a, b in itertools.combinations(group, 2))) + (own if len(group) > 2 else 0)

    return cost, pairs


def every_partition(rest: list[int], size: int) -> Any:
    if not rest:
        yield []
    for others in itertools.combinations(rest[1:], size - 1):
        left = [head for head in rest[1:] if head not in others]
        for partition in every_partition(left, size):
            yield [(rest[0], *others), *partition]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("heads, groups", [(4, 2), (6, 2), (6, 3), (8, 2), (8, 4)])
def test_few_partitions_are_all_tried(heads: int, groups: int, seed: int) -> None:
    cost, _ = random_cost(heads, seed)
    found = balanced(heads, groups, cost)
    least = min(sum(map(cost, partition)) for partition in every_partition(list(range(heads)), heads // groups))
    assert sum(map(cost, found)) == pytest.approx(least, abs=1e-12)
    assert sorted(head for group in found for head in group) == list(range(heads))
    assert {len(group) for group in found} == {heads // groups}


def least_matching(pairs: Tensor) -> float:
    """Return the least sum over a perfect matching, by the table of all sets of heads."""
    heads = len(pairs)
    best = {0: 0.0}
    for taken in range(1, 1 << heads):
        members = [h for h in range(heads) if taken >> h & 1]
        if len(members) % 2 == 0:
            first = members[0]
            best[taken] = min(
                best[taken ^ 1 << first ^ 1 << other] + float(pairs[first, other]) for other in members[1:]
            )
    return best[(1 << heads) - 1]


@pytest.mark.parametrize("seed", range(6))
def test_pairs_of_twelve_heads_are_nearly_the_best_matching(seed: int) -> None:
    cost, pairs = random_cost(12, seed)
    found = sum(map(cost, balanced(12, 6, cost)))
    assert least_matching(pairs) - 1e-9 <= found <= 1.05 * least_matching(pairs)


@pytest.mark.parametrize("heads, groups", [(12, 4), (12, 3), (16, 8), (32, 8)])
def test_many_partitions_are_searched(heads: int, groups: int) -> None:
    for seed in range(3):
        cost, _ = random_cost(heads, seed)
        found = balanced(heads, groups, cost)
        assert sorted(head for group in found for head in group) == list(range(heads))
        assert {len(group) for group in found} == {heads // groups}
        assert sum(map(cost, found)) < 0.9 * sum(map(cost, neighbours(heads, groups)))
        assert found == balanced(heads, groups, cost)


def test_nothing_to_choose_costs_nothing() -> None:
    def cost(group: tuple[int, ...]) -> float:
        raise AssertionError("asked")

    assert balanced(6, 1, cost) == [(0, 1, 2, 3, 4, 5)]
    assert balanced(3, 3, cost) == [(0,), (1,), (2,)]


def task_of(name: str, *, spoils: bool = True, kept_back: int = 1, count: int = 16) -> Task:
    """Return the task of the first layer of a model whose keys and values were exchanged for worse."""
    model = build(name)
    layer = attention_layers(model)[0]
    read: Read = recorded(model, [layer], rows(count), BATCH)[layer.path]
    runnable = Runnable(layer, model.config)
    _, targets = _seen(runnable, read.call, read.rows)
    if spoils:
        heads = runnable.heads()
        runnable.write(replace(heads, k=heads.k + 0.1 * normal(*heads.k.shape).float(), v=0.8 * heads.v.roll(1, 1)))
    return Task(runnable, read.call, read.rows, targets, BATCH, kept_back)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("ridge", [1e-4, 1.0])
def test_the_output_is_fitted_as_a_textbook_does(name: str, ridge: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Least squares of targets and, below them, of the old weights: a row for each input, by the ridge's root."""
    monkeypatch.setattr(repair, "RIDGES", (ridge,))
    task = task_of(name)
    product = task.runnable.output
    has_bias = product.bias is not None
    weight = repair.out_in(product).double()
    old = torch.cat([weight, product.bias.double()[:, None]], 1) if has_bias else weight
    reads, wanted = [], []
    for inputs, targets in task.batches(fitted=True):
        with task.runnable.attended() as read, torch.no_grad():
            task.runnable.run(task.call, inputs)
        reads.append(read[0].flatten(0, -2).double())
        wanted.append(targets.flatten(0, 1).double())
    a, b = torch.cat(reads), torch.cat(wanted)
    a = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1) if has_bias else a
    below = (ridge * float((a.mT @ a).trace()) / a.shape[1]) ** 0.5 * torch.eye(a.shape[1], dtype=a.dtype)
    expected = torch.linalg.lstsq(torch.cat([a, below]), torch.cat([b, below @ old.mT])).solution.mT
    before = task.error()
    repair.fit_output(task)
    assert task.error() < before
    found = repair.out_in(product).double()
    torch.testing.assert_close(found, expected[:, : found.shape[1]], rtol=1e-4, atol=1e-4)
    if has_bias:
        torch.testing.assert_close(product.bias.double(), expected[:, -1], rtol=1e-4, atol=1e-4)


USUAL = repair.RATE


@pytest.mark.parametrize("name", ["llama", "gemma2", "stablelm"])
@pytest.mark.parametrize("rate", [USUAL, 100.0, math.nan], ids=["usual", "absurd", "none"])
def test_repair_never_makes_it_worse(name: str, rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "RATE", rate)
    task, advanced = task_of(name), [0]
    fitted = task_of(name)
    repair.repair(fitted, 0)

    def advance() -> None:
        advanced[0] += 1

    before = task.error()
    errors = repair.repair(task, 12, advance)
    assert errors.before == before
    assert errors.after == task.error() <= before, "what is told is what the weights written give"
    assert errors.after <= fitted.error()
    assert advanced[0] == 3
    assert all(bool(p.isfinite().all()) and not p.requires_grad for p in task.runnable.module.parameters())
    if rate == USUAL:
        assert errors.after < 0.9 * fitted.error()
    else:  # the output may have been fitted once more
        mine, theirs = task.runnable.heads(), fitted.runnable.heads()
        assert all(torch.equal(getattr(mine, part), getattr(theirs, part)) for part in "qkv"), "weights are put back"


def test_what_is_exact_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of("llama", spoils=False)
    monkeypatch.setattr(repair, "fit_output", lambda task: pytest.fail("called"))
    assert repair.repair(task, 5).after < 1e-6


def test_the_last_batches_are_kept_back() -> None:
    task = task_of("llama", kept_back=2, count=5 * BATCH)
    fitted, back = ([len(x) for x, _ in task.batches(fitted=part)] for part in (True, False))
    assert (fitted, back) == ([BATCH] * 3, [BATCH] * 2)
    assert torch.equal(torch.cat([x for part in (True, False) for x, _ in task.batches(fitted=part)]), task.inputs)


def costs_of(name: str, change: Callable[[Heads], Heads] = lambda heads: heads) -> tuple[Any, Any, Runnable, Any]:
    model = tiny.made(name)
    layer = attention_layers(model)[0]
    call = recorded(model, [layer], rows(4), BATCH)[layer.path].call
    runnable = Runnable(layer, model.config)
    heads = change(runnable.heads())
    found = found_maps(runnable, call, heads, model.config)
    return key_costs(runnable, call, heads, found), heads, runnable, (call, found)


@pytest.mark.parametrize("name", ["llama", "gemma2", "stablelm", "bigcode"])
def test_costs_of_keys_go_with_the_square_of_the_output(name: str) -> None:
    """A head whose output goes nowhere costs nothing; one of three times the output costs nine times as much."""

    def change(heads: Heads) -> Heads:
        o = heads.o.clone()
        o[:, 1], o[:, 2] = 0, 3 * o[:, 2]
        return replace(heads, o=o)

    usual, _, _, _ = costs_of(name)
    changed, heads, runnable, _ = costs_of(name, change)
    for old, new in ((usual.pairs, changed.pairs), (usual.free[None], changed.free[None])):
        if float(old.sum()):
            assert float(old.min()) > 0
            torch.testing.assert_close(new[:, 1], torch.zeros_like(new[:, 1]))
            torch.testing.assert_close(new[:, 2], 9 * old[:, 2], rtol=1e-4, atol=0)
            torch.testing.assert_close(new[:, [0, 3]], old[:, [0, 3]], rtol=1e-4, atol=0)
    assert torch.equal(runnable.heads().k, heads.k), "its own heads stand again"


def test_a_cost_is_how_far_the_output_moves() -> None:
    """Of one head at a time: the output projection of the others is zero, and the layer's output is what moves."""

    def alone(heads: Heads) -> Heads:
        o = torch.zeros_like(heads.o)
        o[:, 2] = heads.o[:, 2]
        return replace(heads, o=o)

    found, heads, runnable, (call, maps) = costs_of("llama", alone)
    usual = runnable.outputs(call, heads)
    for index, (a, b) in enumerate(maps.pairs.tolist()):
        moved = 0.0
        for step in ((SHARE, 0.0), (0.0, SHARE)):
            k = heads.k.clone()
            k[:, a] += step[0] * heads.k[:, a] - step[1] * heads.k[:, b]
            k[:, b] += step[0] * heads.k[:, b] + step[1] * heads.k[:, a]
            off = (runnable.outputs(call, replace(heads, k=k)) - usual).double()
            moved += float(off.square().sum(-1).mean()) / SHARE**2 / 2
        assert float(found.pairs[index, 2]) == pytest.approx(moved, rel=1e-3)


def test_a_moment_that_tells_too_little() -> None:
    costs, heads, _, (_, maps) = costs_of("llama")
    flat = torch.ones(53, 53, dtype=torch.float64)
    for moment, words in ((flat, "span 1 directions, and a head has 10 numbers"), (flat * math.nan, "NaN or infinite")):
        with pytest.raises(ConfigError, match=words):
            aligned(heads, 1, Seen(moment, costs), maps, is_fixed=False)
