"""A stand-in for CUDA graphs on the CPU: what is captured is run again at every replay, and nothing else helps it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from hf_accel.compilation import capture
from hf_accel.compilation.step import StepResults


class Replayed:
    """Captures by keeping the function; a replay writes what it returns where the first results lie.

    Like a graph, a replay sees the addresses of the capture and none of the host's numbers: between replays the results
    are poisoned. captured: how many were. fails: an error to raise in captures.
    """

    one_call = True
    fails: Exception | None = None
    captured = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def capture(self, warm_up: Callable[[], Any], run: Callable[[], Any]) -> Callable[[], Any]:
        warm_up()
        if (error := type(self).fails) is not None:
            raise type(error)(*error.args)  # a fresh one: the test's own would keep what its traceback holds
        type(self).captured += 1
        first = warm_up()
        results = StepResults(*(torch.full_like(tensor, 0) for tensor in first))
        results.logits.fill_(torch.nan)

        def replay() -> StepResults:
            results.logits.fill_(torch.nan)
            results.choices.fill_(-1)
            for kept, made in zip(results, run(), strict=True):
                kept.copy_(made)
            return results

        return replay


@contextmanager
def captures_here() -> Iterator[type[Replayed]]:
    """Let the CPU capture steps for the length of the block."""
    with pytest.MonkeyPatch.context() as patch:
        kind = type("Replayed", (Replayed,), {"captured": 0})
        patch.setitem(capture.CAPTURES, "cpu", kind)
        yield kind
