"""Ten thousand draws from a vocabulary of 128,256 tokens: natively and by transformers' processors and torch's draw.

Slow: stock takes some 6 ms for each. `pytest -s -m slow tests/walks/test_draws.py` prints what was counted.
"""

from __future__ import annotations

import pytest
import torch
from sampling import RULES, drawn

from hf_accel.kernels import native

pytestmark = [pytest.mark.slow, pytest.mark.native]
VOCABULARY, DRAWS, SHAPES = 128_256, 2_500, (3.0, 1.0)
"""What normal numbers are multiplied by: of the fifty best tokens top-p keeps some then, or most."""


def counted(dtype: torch.dtype, shape: float, draws: int) -> tuple[int, int, int]:
    """Draw from random logits with the usual rules; return how many tokens were stock's, were not, were left to stock.

    After a draw that was made the generator's state is stock's as well; after one that was not it is as before.
    """
    generator = torch.Generator().manual_seed(int(shape) + (dtype is torch.bfloat16))
    ids, state = torch.zeros(1, 1, dtype=torch.long), torch.get_rng_state()
    equal = wrong = left = 0
    for _ in range(draws):
        logits = (torch.randn(1, VOCABULARY, generator=generator) * shape).to(dtype)
        before = state.clone()
        token = native.choose(logits, None, None, RULES["usual"], state)
        if token is None:
            assert torch.equal(state, before), "the state of a choice that was not made"
        torch.set_rng_state(before)
        expected = drawn(logits, ids, RULES["usual"])
        after = torch.get_rng_state()
        if token is None:
            left += 1
        elif token.tolist() == expected.tolist() and torch.equal(state, after):
            equal += 1
        else:
            wrong += 1
        state = after
    return equal, wrong, left


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_draws_of_a_large_vocabulary_are_stocks(dtype: torch.dtype, shape: float) -> None:
    torch.manual_seed(1)
    equal, wrong, left = counted(dtype, shape, DRAWS)
    print(f"\n{dtype}, logits times {shape}: {equal} equal, {wrong} wrong, {left} left to stock")
    assert wrong == 0
    assert equal + left == DRAWS
    assert equal > 0.9 * DRAWS, "it is stock that chose"
