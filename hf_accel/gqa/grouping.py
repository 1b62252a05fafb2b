"""Which heads share: a partition into groups of one size that loses least."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Groups = list[tuple[int, ...]]
Cost = Callable[[tuple[int, ...]], float]

MOST_PARTITIONS = 300  # that are all looked at: those of 8 heads, 105 into pairs and 35 into fours
STARTS = 32
MOST_TRIALS = 256  # of groups whose cost is computed after the search by pairs


def neighbours(heads: int, groups: int) -> Groups:
    """Return the groups of neighbouring heads."""
    size = heads // groups
    return [tuple(range(first, first + size)) for first in range(0, heads, size)]


def balanced(heads: int, groups: int, cost: Cost) -> Groups:
    """Return the partition of `heads` into `groups` of one size whose costs add up to the least that was found.

    Few partitions are all tried. Of many, the sum over the pairs of a group stands for its cost: from several starts
    the best exchange of two heads is made until none gains, which for pairs is the cost itself; then exchanges are
    made that lower the cost of the groups themselves.
    """
    size = heads // groups
    known: dict[tuple[int, ...], float] = {}

    def of(group: tuple[int, ...]) -> float:
        if group not in known:
            known[group] = cost(group)
        return known[group]

    def total(partition: Groups) -> float:
        return sum(map(of, partition))

    if size == 1 or groups == 1:
        return neighbours(heads, groups)
    count = math.factorial(heads) // (math.factorial(size) ** groups * math.factorial(groups))
    if count <= MOST_PARTITIONS:
        return min(_partitions(tuple(range(heads)), size), key=total)
    pairs = torch.zeros(heads, heads, dtype=torch.float64)
    for a, b in itertools.combinations(range(heads), 2):
        pairs[a, b] = pairs[b, a] = of((a, b))
    generator = torch.Generator().manual_seed(0)
    starts = [torch.arange(heads)] + [torch.randperm(heads, generator=generator) for _ in range(STARTS - 1)]
    found = [_exchanged(pairs, start // size) for start in starts]
    best = min((_groups_of(labels, groups) for labels in found), key=lambda p: _by_pairs(p, pairs))
    return best if size == 2 else _polished(best, of)


def _partitions(rest: tuple[int, ...], size: int) -> Iterator[Groups]:
    """Yield every partition of `rest` into groups of `size`."""
    if not rest:
        yield []
        return
    for others in itertools.combinations(rest[1:], size - 1):
        group = (rest[0], *others)
        for partition in _partitions(tuple(head for head in rest if head not in group), size):
            yield [group, *partition]


def _exchanged(pairs: Tensor, labels: Tensor) -> Tensor:
    """Return the labels [H] of the groups after the best exchange of two heads, again and again, until none gains."""
    labels = labels.clone()
    heads = torch.arange(len(labels))
    while True:
        member = torch.nn.functional.one_hot(labels).double()
        to_group = pairs @ member  # [H, groups]: of a head with all of a group
        own = to_group[heads, labels]
        gain = to_group[:, labels] + to_group[:, labels].T - 2 * pairs - own[:, None] - own
        gain[labels[:, None] == labels] = 0
        a, b = divmod(int(gain.argmin()), len(labels))
        if not gain[a, b] < -1e-12 * float(pairs.sum()):
            return labels
        labels[a], labels[b] = labels[b].clone(), labels[a].clone()


def _groups_of(labels: Tensor, groups: int) -> Groups:
    found = [tuple((labels == label).nonzero().flatten().tolist()) for label in range(groups)]
    return sorted(found)


def _by_pairs(partition: Groups, pairs: Tensor) -> float:
    return sum(float(pairs[list(group)][:, list(group)].sum()) for group in partition)


def _polished(partition: Groups, of: Cost) -> Groups:
    """Make exchanges that lower the cost of the groups, until a round finds none or enough was tried."""
    partition, trials = list(partition), 0
    while True:
        is_better = False
        for i, j in itertools.combinations(range(len(partition)), 2):
            for a, b in itertools.product(partition[i], partition[j]):
                if trials >= MOST_TRIALS:
                    return sorted(partition)
                if a not in partition[i] or b not in partition[j]:
                    continue
                new = [tuple(sorted({*partition[k]} - {out} | {into})) for k, out, into in ((i, a, b), (j, b, a))]
                trials += 1
                if sum(map(of, new)) < of(partition[i]) + of(partition[j]):
                    partition[i], partition[j] = new
                    is_better = True
        if not is_better:
            return sorted(partition)
