"""The best score's index is the one that torch's own argmax gives, on which stock's text depends."""

from __future__ import annotations

import math

import pytest
import torch

from hf_accel.decoding.choosing import best, choose_token


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 128), (2, 3, 50), (1, 4096), (2, 0, 5)], ids=str)
def test_the_best_score(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    for levels in (2, 5, 1000):  # of few levels many scores are equal
        scores = torch.randint(levels, shape, generator=generator).float() - levels // 2
        for special in (None, math.inf, -math.inf, math.nan):
            if special is not None:
                scores = scores.masked_fill(torch.rand(shape, generator=generator) < 0.2, special)
            assert torch.equal(best(scores), scores.argmax(dim=-1))
            assert torch.equal(choose_token(scores, False), scores.argmax(dim=-1))


def test_zeros_of_either_sign_are_equal_and_what_numpy_cannot_read_is_read_by_torch() -> None:
    assert best(torch.tensor([[-0.0, 0.0], [0.0, -0.0]])).tolist() == [0, 0]
    scores = torch.tensor([[1.0, 3.0, 2.0]])
    for other in (scores.bfloat16(), scores.clone().requires_grad_(), scores.double()):
        assert best(other).tolist() == [1]
    assert best(torch.arange(12.0).view(3, 4).T).tolist() == [2] * 4
