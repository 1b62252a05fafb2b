"""Which cached positions to keep: scores of positions by several methods, and the choice of the best of them.

Letters: B batch, T query tokens, S key positions, H query heads, G kv heads, R = H / G query heads of each kv head,
D head size. `valid` [B, S] is false where a row is padded: such a position has no influence and is kept only where a
row is shorter than what is kept, so that a padded row keeps what it would keep alone.

StreamingLLM, Xiao et al. 2023 (arXiv:2309.17453), Sec. 3.2: the first positions and the last, without scores.
SnapKV, Li et al. 2024 (arXiv:2404.14469), Sec. 4: attention of the prompt's last queries, pooled over neighbours.
H2O, Zhang et al. 2023 (arXiv:2306.14048), Alg. 1: attention of all queries so far, summed.
TOVA, Oren et al. 2024 (arXiv:2401.06104): attention of the last query, one choice for all heads of a layer.
Key norm, Devoto et al. 2024 (arXiv:2406.11430): keys of small norm attract attention; no query is needed.

Cost: the weights O(B·H·T·S·D) in time and B·H·T·S fp32 values, the choice O(B·G·S·log S).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d


def attention_weights(query: Tensor, keys: Tensor, scale: float, visible: Tensor) -> Tensor:
    """Return softmax(scale · q kᵀ) over the visible positions in fp32 [B, G, R, T, S]; query head h is [h // R, h % R].

    A query that sees nothing, as of padding, has weights of zero. Keys are not expanded.

    Args:
        query: [B, H, T, D], H a multiple of G.
        keys: [B, G, S, D].
        scale: factor of the products, in most models 1/sqrt(D).
        visible: [B, T, S] bool, causality and padding together.

    Raises:
        ValueError: H is not a multiple of G, or `visible` is not [B, T, S].
    """
    batch, heads, tokens, size = query.shape
    groups, positions = keys.shape[1], keys.shape[2]
    if heads % groups:
        raise ValueError(f"{heads} query heads cannot share {groups} kv heads evenly")
    if tuple(visible.shape) != (batch, tokens, positions):
        raise ValueError(f"visible must be {[batch, tokens, positions]}, not {list(visible.shape)}")
    ratio = heads // groups
    folded = query.float().reshape(batch, groups, ratio * tokens, size)  # [B, G, R·T, D]
    products = (folded @ keys.float().transpose(2, 3)).mul_(scale)  # [B, G, R·T, S]
    products = products.reshape(batch, groups, ratio, tokens, positions)
    hidden = ~visible[:, None, None]  # [B, 1, 1, T, S]
    weights = products.masked_fill_(hidden, -math.inf).softmax(dim=-1)
    return weights.masked_fill_(hidden, 0.0)  # also where nothing is visible and the softmax is not a number


def snapkv_scores(
    weights: Tensor, valid: Tensor, kernel_size: int = 7, pooling: Literal["max", "mean"] = "max"
) -> Tensor:
    """Return the attention that the last T queries pay to each position before them, pooled over neighbours [B, G, S].

    Summed over the queries, pooled (stride 1) for each query head, averaged over the R query heads of a kv head. The
    paper's experiments pool by maximum with a kernel of 5 or 7, the authors' code by default by mean with 5; both have
    one choice for each query head, which grouped heads cannot have. Pooling keeps the neighbours of what was looked
    at, as the rest of a phrase of which the window attends the beginning. It takes in neither padding nor the window;
    a mean divides by `kernel_size` at the ends too. The window's own positions score infinity: they are always kept.

    Args:
        weights: [B, G, R, T, S] of the last T of S positions.
        valid: [B, S] bool.
        kernel_size: odd, in positions.
        pooling: "max" or "mean".

    Raises:
        ValueError: an even or non-positive kernel, an unknown pooling, more queries than positions, or shapes that do
            not fit.
    """
    _check_weights(weights, valid)
    batch, groups, ratio, tokens, positions = weights.shape
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, not {kernel_size}")
    if pooling not in ("max", "mean"):
        raise ValueError(f'pooling must be "max" or "mean", not {pooling!r}')
    if tokens > positions:
        raise ValueError(f"a window of {tokens} queries does not fit {positions} positions")
    scores = weights.new_full((batch, groups, positions), math.inf)
    earlier = positions - tokens
    if earlier:
        looked = weights[..., :earlier].sum(dim=3)  # [B, G, R, S - T]
        looked = looked.masked_fill(~valid[:, None, None, :earlier], 0.0).flatten(0, 2)[:, None]  # [B·G·R, 1, S - T]
        pool = max_pool1d if pooling == "max" else avg_pool1d
        pooled = pool(looked, kernel_size, stride=1, padding=kernel_size // 2)
        scores[..., :earlier] = pooled.reshape(batch, groups, ratio, earlier).mean(dim=2)
    return scores.masked_fill_(~valid[:, None], 0.0)


def h2o_scores(weights: Tensor, valid: Tensor) -> Tensor:
    """Return the attention that each position receives of all T queries, averaged over the R heads [B, G, S].

    Args:
        weights: [B, G, R, T, S].
        valid: [B, S] bool.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_weights(weights, valid)
    return weights.sum(dim=3).mean(dim=2).masked_fill_(~valid[:, None], 0.0)


def accumulate(scores: Tensor | None, weights: Tensor, valid: Tensor) -> Tensor:
    """Return `scores` with the attention of T more queries added [B, G, S]: a running `h2o_scores`.

    Blocks of queries one after the other give what all at once give, with less memory: B·H·T·S values a block.

    Args:
        scores: [B, G, P], P <= S, of the first P positions so far; None before the first block. Not changed.
        weights: [B, G, R, T, S].
        valid: [B, S] bool.

    Raises:
        ValueError: scores of more positions, or of other rows or heads, than the weights.
    """
    added = h2o_scores(weights, valid)
    if scores is None:
        return added
    known = scores.shape[-1]
    if scores.shape[:-1] != added.shape[:-1] or known > added.shape[-1]:
        raise ValueError(f"scores {list(scores.shape)} do not continue to {list(added.shape)}")
    added[..., :known] += scores
    return added


def tova_scores(weights: Tensor, valid: Tensor) -> Tensor:
    """Return the last query's attention, averaged over all query heads, the same for each kv head [B, G, S].

    Args:
        weights: [B, G, R, T, S]; only the last of the T queries counts.
        valid: [B, S] bool.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_weights(weights, valid)
    last = weights[..., -1, :].mean(dim=(1, 2)).masked_fill_(~valid, 0.0)  # [B, S]
    return last[:, None].repeat(1, weights.shape[1], 1)


def key_norm_scores(keys: Tensor) -> Tensor:
    """Return minus the Euclidean norm of each key [B, G, S], in fp32 or wider, for keys [B, G, S, D].

    Rotary embeddings keep norms, so that keys as they are cached will do.
    """
    return -torch.linalg.vector_norm(keys, dim=-1, dtype=torch.promote_types(keys.dtype, torch.float32))


def keep_positions(
    scores: Tensor | None, valid: Tensor, keep: int, sinks: int = 0, recent: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the positions to keep, ascending, as int64 [B, G, keep], and which of them are not padding, bool.

    The first `sinks` and the last `recent` valid positions of each row are always kept, then those of the highest
    scores, of equal ones the later. A row of fewer valid positions than `keep` keeps them all, filled up with its last
    padding: before its positions where it is padded on the left.

    Args:
        scores: [B, G, S], infinite ones allowed, a NaN is the lowest; None for StreamingLLM, and then G is 1 in what
            is returned and `keep` is `sinks` + `recent`.
        valid: [B, S] bool.
        keep: positions of each row and kv head, 1 to S.
        sinks: at least 0.
        recent: at least 0.

    Raises:
        ValueError: counts that are negative or do not fit each other, or scores that do not fit `valid`.
    """
    batch, positions = valid.shape
    if sinks < 0 or recent < 0:
        raise ValueError(f"sinks and recent must not be negative: {sinks}, {recent}")
    if keep < sinks + recent:
        raise ValueError(f"keep={keep} is less than sinks + recent = {sinks} + {recent}")
    if not 1 <= keep <= positions:
        raise ValueError(f"keep must be 1 to {positions}, the number of positions, not {keep}")
    if scores is None:
        if keep != sinks + recent:
            raise ValueError(f"without scores keep={keep} must be sinks + recent = {sinks} + {recent}")
        scores = torch.zeros(batch, 1, positions, device=valid.device)
    if scores.dim() != 3 or (scores.shape[0], scores.shape[2]) != (batch, positions):
        raise ValueError(f"scores must be [{batch}, G, {positions}], not {list(scores.shape)}")
    number = valid.long().cumsum(dim=-1)  # [B, S]: 1 is the row's first valid position
    certain = (number <= sinks) | (number > number[:, -1:] - recent)
    rank = torch.where(valid, 1 + certain.long(), 0)[:, None].expand_as(scores)  # [B, G, S]
    # lexicographic, by two stable sorts; from the last position to the first, so that of equal ones the later wins
    scores = scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    scores = scores.masked_fill(~valid[:, None], -math.inf).flip(-1)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, rank.flip(-1).gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    index = (positions - 1 - order[..., :keep]).sort(dim=-1).values
    return index, valid[:, None].expand_as(scores).gather(-1, index)


def kept(states: Tensor, index: Tensor) -> Tensor:
    """Return keys or values [B, G, S, D] at the positions `index` [B, G or 1, K], as a copy [B, G, K, D]."""
    index = index.expand(states.shape[0], states.shape[1], index.shape[2])
    return states.gather(2, index[..., None].expand(-1, -1, -1, states.shape[3]))


def _check_weights(weights: Tensor, valid: Tensor) -> None:
    if weights.dim() != 5 or tuple(valid.shape) != (weights.shape[0], weights.shape[4]):
        raise ValueError(
            f"weights must be [B, G, R, T, S] and valid [B, S]: {list(weights.shape)}, {list(valid.shape)}"
        )
