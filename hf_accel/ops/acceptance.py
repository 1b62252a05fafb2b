"""Lossless speculative sampling: which drafts are kept, and the token that follows them.

`accept` is Algorithm 1 of Leviathan et al. 2023 (arXiv:2211.17192), and of Chen et al. 2023 (arXiv:2302.01318): what it
emits is distributed as the target, whatever the proposal. Cost: two values of each of the k rows and one residual over
the vocabulary V, hence O(k + V).

`coupled` is the Gumbel coupling of Daliri, Musco, Suresh 2024 (arXiv:2408.07978): the target's own draw decides and
drafts only guess it. Cost: one division and one maximum over the vocabulary.

Logits processors change nothing in either: the target is the distribution after them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def accept(
    target: Tensor,
    drafts: Sequence[int],
    proposal: Tensor | None,
    uniforms: Sequence[float],
    draw: Callable[[Tensor], int],
) -> tuple[list[int], int]:
    """Return the emitted tokens, which are the accepted drafts and one token more, and how many drafts were accepted.

    Draft i is accepted with probability min(1, p(x) / q(x)), p = target[i], q = proposal[i]. The token that follows is
    drawn from `residual(p, q)` at the first rejection, or from target[k] if there is none. A draft of q(x) = 0 cannot
    have been drawn from q, so that no choice biases the output; where rounding made q(x) zero the ratio is infinite:
    the draft is accepted if p(x) > 0. A draft of p(x) = 0 is always rejected.

    Args:
        target: probabilities [k + 1, V]; row i is the distribution after i drafts.
        drafts: the k drafted tokens, draft i drawn from proposal[i].
        proposal: probabilities [k, V], or None for a deterministic drafter: a point mass on each draft.
        uniforms: k numbers in [0, 1), independent of the drafts.
        draw: samples an index from probabilities [V]. It is called once. They sum to one up to rounding; of weights
            that do not, as of rows of `target` that were not normalised, it should draw in proportion.

    Raises:
        ValueError: the shapes do not fit each other, or a draft is not in the vocabulary.
    """
    _check(target, drafts, proposal, uniforms)
    k = len(drafts)
    if k == 0:
        return [draw(target[0])], 0
    wanted = _values(target, drafts)
    proposed = [1.0] * k if proposal is None else _values(proposal, drafts)
    accepted = 0
    # u < p / q without the division: right for q = 0 as well, and p = 0 is below no u
    while accepted < k and uniforms[accepted] * proposed[accepted] < wanted[accepted]:
        accepted += 1
    if accepted == k:
        distribution = target[k]
    elif proposal is None:
        distribution = _without(target[accepted], drafts[accepted])
    else:
        distribution = residual(target[accepted], proposal[accepted])
    return [*drafts[:accepted], draw(distribution)], accepted


def residual(p: Tensor, q: Tensor) -> Tensor:
    """Return max(0, p - q), normalised [V], for p and q [V]; p where that is zero everywhere.

    It is zero everywhere if p = q, after which there is no rejection but by rounding.
    """
    return _normalised((p - q).clamp_(min=0), p)


def coupled(probabilities: Tensor, exponentials: Tensor) -> Tensor:
    """Return argmax(probabilities / exponentials) [...], for two tensors [..., V]: the winner of an exponential race.

    With independent exponentials of rate one (all > 0) it is a sample of the probabilities, which need not sum to one.
    torch.multinomial draws one sample in this way: the exponentials that `torch.empty_like(probabilities)` is filled
    with by `exponential_(1)` from the same generator give the same token, bit for bit.

    Drafter-invariant: a draft drawn from q with the exponentials that the target p is drawn with equals the target's
    token with probability at least (1 - TV) / (1 + TV), TV the total variation distance of p and q, against 1 - TV for
    `accept`. What is emitted is always the target's token. It does not depend on the drafts at all, so that the text is
    that of plain sampling with the same exponentials.
    """
    return (probabilities / exponentials).argmax(dim=-1)


def _check(target: Tensor, drafts: Sequence[int], proposal: Tensor | None, uniforms: Sequence[float]) -> None:
    k = len(drafts)
    if target.dim() != 2 or target.shape[0] != k + 1:
        raise ValueError(f"{k} drafts need a target [{k + 1}, V], not {list(target.shape)}")
    vocabulary = target.shape[1]
    if proposal is not None and tuple(proposal.shape) != (k, vocabulary):
        raise ValueError(f"{k} drafts need a proposal [{k}, {vocabulary}], not {list(proposal.shape)}")
    if len(uniforms) != k:
        raise ValueError(f"{k} drafts need {k} uniforms, not {len(uniforms)}")
    if any(not 0 <= token < vocabulary for token in drafts):
        raise ValueError(f"a draft is not in the vocabulary of {vocabulary}: {list(drafts)}")


def _values(rows: Tensor, tokens: Sequence[int]) -> list[float]:
    """Return rows[i, tokens[i]] for every token, in one transfer: on a device each would wait for the queue."""
    columns = torch.tensor(tokens, device=rows.device)
    return rows[: len(tokens)].gather(1, columns[:, None])[:, 0].tolist()


def _without(p: Tensor, token: int) -> Tensor:
    """Return the residual of p and a point mass; p may exceed one by rounding, and still nothing is left of it."""
    rest = p.clone()
    rest[token] = 0
    return _normalised(rest, p)


def _normalised(weights: Tensor, otherwise: Tensor) -> Tensor:
    total = weights.sum()
    return torch.where(total > 0, weights / total, otherwise)  # on the device: no transfer to decide it
