"""Whether compiled steps are faster than the model as it is, where nothing is captured and so nothing is certain."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from hf_accel.compilation.caches import use_slot
from hf_accel.compilation.slots import Slot, capacity_for
from hf_accel.core.drift import CACHE

PROMPT = 100
ROUNDS = 15


@torch.no_grad()
def step_seconds(model: Any, make_step: Any) -> tuple[float, float]:
    """Return the median seconds of a token of the model as it is, and in a static step, timed in alternation."""
    config = model.config.get_text_config(decoder=True)
    ids = torch.arange(PROMPT + 1, device=model.device)[None] % config.vocab_size
    plain, fixed = DynamicCache(config=config), DynamicCache(config=config)
    slot = Slot(1, capacity_for(PROMPT), None, model.device)
    use_slot(fixed, slot)
    for cache in (plain, fixed):
        model(ids[:, :PROMPT], use_cache=True, **{CACHE: cache})
    step = make_step(model, slot, 1)
    step.ids.copy_(ids[:, PROMPT:])

    def eager() -> None:
        position = torch.tensor([[plain.get_seq_length()]])
        model(ids[:, PROMPT:], position_ids=position, use_cache=True, **{CACHE: plain})

    def static() -> None:
        slot.set_lengths([PROMPT])
        step.positions.fill_(PROMPT)
        step.run()

    def seconds(run: Callable[[], None]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    for run in (eager, static):
        run()
    times = [(seconds(eager), seconds(static)) for _ in range(ROUNDS)]
    return statistics.median(t for t, _ in times), statistics.median(t for _, t in times)
