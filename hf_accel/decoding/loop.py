"""The token loop of greedy decoding and sampling, over inputs, processors and criteria that stock `generate` prepared.

It only drives: where tokens come from is `Steps`, what becomes of them `Writing`. Cost: one forward pass per token,
and of Python about 60 µs; where tokens follow on one another (`SingleTokens.follow`) 23 µs with 5 layers, 40 with 12.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from hf_accel.core.calls.call import Call
from hf_accel.core.calls.doors import MAKERS, Door, Scheduler
from hf_accel.core.calls.rollback import recording
from hf_accel.core.drift import CACHE
from hf_accel.decoding.leaving import Leaving
from hf_accel.decoding.rows_left import RowsLeft
from hf_accel.decoding.speculating import speculation_of, steps_of
from hf_accel.decoding.writing import Writing


class TokenLoop:
    """Serves the calls that `obstacle` lets through. rows_left: counts rows that leave; None: none leave."""

    def __init__(self, rows_left: RowsLeft | None) -> None:
        self.rows_left = rows_left

    def obstacle(self, call: Call) -> str | None:
        """Return why stock must serve this call, None if this loop does."""
        if call.synced_gpus:
            return "synced_gpus"
        if call.model._valid_auto_compile_criteria(call.model_kwargs, call.generation_config):
            return "the caller's cache and compile settings ask for a compiled forward"
        if call.input_ids.device.type == "mps":
            return "deferred stopping on mps"
        return None

    def run(self, call: Call) -> Any:
        """Generate; returns what stock's `_sample` would: ids [B, S], or a GenerateDecoderOnlyOutput."""
        model, config = call.model, call.generation_config
        speculation, writing = speculation_of(call), Writing(call)
        scheduler: Scheduler | None = call.doors.get(Door.SCHEDULE)
        reason = "drafts are verified, several tokens at a time" if speculation else None
        seated = nullcontext(nullcontext()) if scheduler is None else scheduler.seated(call, reason)
        with seated as seat, recording(call.model_kwargs[CACHE]) if speculation else nullcontext():
            outputs = model._prefill(
                call.input_ids, config, call.model_kwargs, is_first_iteration=not config.is_assistant
            )
            steps = steps_of(call, speculation, outputs)
            del outputs
            writing.lag = steps.lag
            if self.rows_left is not None and writing.pads_ended_rows:
                steps.leaving, writing.asks_who_ended = Leaving(call, steps.passes, self.rows_left), True
            try:
                with model._optimize_model_for_decode():
                    while writing.goes_on():
                        if writing.ended:
                            steps.leave(writing.ended, writing.length)
                        with seat:
                            step = steps.follow() or steps.next(writing.input_ids, writing.unfinished)
                        writing.take(step)
                if surplus := writing.take_back():
                    steps.take_back(surplus)
                steps.close(writing.input_ids)
                if steps.leaving is not None:
                    steps.leaving.close()
                return writing.result(steps.cache)
            finally:
                writing.settle()


MAKERS[Door.TOKEN_LOOP] = lambda: TokenLoop(RowsLeft())
