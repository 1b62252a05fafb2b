"""Stands where passes run: those of concurrent calls become one, the others take turns with it."""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hf_accel.batching.admission import Admission
from hf_accel.batching.config import BatchingConfig
from hf_accel.batching.joining import fits, follow_rows, joining_obstacle, part_of
from hf_accel.batching.meeting import Meeting, Submission
from hf_accel.batching.pace import Pace
from hf_accel.batching.passes import Passes
from hf_accel.batching.seat import Seat, Within
from hf_accel.batching.statistics import BatchingStatistics
from hf_accel.batching.turn import Turn
from hf_accel.core.calls.call import Call
from hf_accel.core.calls.cancelling import check_wanted
from hf_accel.core.drift import CACHE
from hf_accel.errors import CancelledCallError

ONE_CALL = "steps are captured over the buffers of one call, so that calls run one after the other"
_latest: Any = itertools.count(1)
_engines: Any = weakref.WeakSet()  # of this process


class Engine:
    """Merges the passes of one model's calls.

    inner: runs a pass with the arguments of the model's forward: who stood at the door before, or the model.
    """

    def __init__(self, model: Any, config: BatchingConfig, inner: Callable[..., Any] | None) -> None:
        self._model, self.config, self._inner = weakref.ref(model), config, inner
        self.statistics = BatchingStatistics(None if config.latency_ms is None else config.latency_ms / 1e3)
        self._one_call = bool(getattr(inner, "one_call", False))
        self.pace = Pace(self.statistics.latency_s, config.max_rows, config.chunk_tokens, one_call=self._one_call)
        self._start()
        _engines.add(self)

    def _start(self) -> None:
        """Begin with nobody inside: also in the child of a fork, where the threads of the others are gone."""
        self.turn, self._local = Turn(), threading.local()
        self.admission = Admission(self.config.max_rows, self.config.max_tokens, self.pace.most_rows)
        self.passes = Passes(self.turn, self.pace, self.statistics, self.run)
        self.meeting = Meeting(self.passes.run, self.config.max_wait_ms / 1e3)
        self.passes.gather = self.meeting.gather

    def run(self, **inputs: Any) -> Any:
        """Run a pass by whoever ran it before, whose turn it is."""
        inner = self._inner or self._model()
        return inner(**inputs)  # type: ignore[misc]

    @contextmanager
    def passing(self, tokens: int) -> Iterator[None]:
        """Wrap a pass of the model over so many tokens per row that no meeting makes: it waits for its turn."""
        if self.turn.is_mine:  # within a step, which may be for other calls than the one of this thread
            yield
            return
        check_wanted()
        seat = self._seat
        with self.turn.taken(next(_latest) if seat is None else seat.number):
            begin = time.perf_counter()
            yield
        if tokens > 1:
            self.pace.prompt(tokens, time.perf_counter() - begin)

    @property
    def _seat(self) -> Seat | None:
        return getattr(self._local, "seat", None)

    # ---- the doors

    def __call__(self, **inputs: Any) -> Any:
        """Return the outputs of the model, of a pass that may be for other calls, too. See `Door.FORWARD`."""
        seat = self._seat
        if seat is not None and seat.part is not None and follow_rows(seat.part, inputs):
            self.admission.shrink(seat.place, seat.part.rows)
        if seat is None or seat.part is None or not fits(seat.part, inputs):
            with self.turn.taken(next(_latest) if seat is None else seat.number):
                return self.run(**inputs)
        seat.write()
        if self._goes_alone():
            with self._timed(seat):
                return self.run(**inputs)
        key = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), type(seat.part.cache)
        return self.meeting.submit(Submission(seat.part, inputs, key))

    def follow(self, cache: Any) -> torch.Tensor | None:
        """Return the tokens that follow greedily, where nobody else writes. See `SingleTokens.follow`."""
        follow, seat = getattr(self._inner, "follow", None), self._seat
        if follow is None or seat is None or not self._goes_alone():
            return None
        with self._timed(seat):
            found: torch.Tensor | None = follow(cache)
            return found

    def _goes_alone(self) -> bool:
        """Return whether a step of this call is better made at once than with those of others."""
        return self.meeting.writers < 2 or not self.pace.merges(self.meeting.writers)

    @contextmanager
    def _timed(self, seat: Seat) -> Iterator[None]:
        """Wrap a step of one call."""
        with self.turn.taken(seat.number, is_step=True):
            begin = time.perf_counter()
            yield
            self.pace.step(seat.part.rows if seat.part else 1, time.perf_counter() - begin)

    @contextmanager
    def seated(self, call: Call, reason: str | None) -> Iterator[Any]:
        """Give a call its seat, once there is room for it. See `hf_accel.core.calls.doors.Scheduler`."""
        if self._seat is not None:
            yield Within()
            return
        begin, rows = time.perf_counter(), len(call.input_ids)
        reason = ONE_CALL if self._one_call else reason or joining_obstacle(call)
        tokens = rows * int(call.generation_config.max_length or call.input_ids.shape[1])
        place = self.admission.enter(rows, tokens, check_wanted)
        seat = Seat(self.turn, self.meeting, self.statistics, place, None if reason else part_of(call))
        try:
            self._local.seat = seat
            self.statistics.began(reason, time.perf_counter() - begin)
            if seat.part is not None and self.admission.rows > rows:
                self._chunk(call)
            yield seat
        except CancelledCallError:
            self.statistics.was_cancelled()
            raise
        finally:
            self._local.seat = None
            seat.close()
            self.passes.forget()
            self.admission.leave(place)

    def _chunk(self, call: Call) -> None:
        """Let the prompt of a call be read in chunks, where that is how its cache is filled anyway.

        Of equal length: a pass over the few tokens that would be left over takes as long as reading the weights.
        """
        config, chunk, tokens = call.generation_config, self.pace.chunk(self.admission.rows), call.input_ids.shape[1]
        layers: Any = call.model_kwargs[CACHE].layers
        is_plain = all(getattr(layer, "takes_states", False) for layer in layers)
        if chunk and is_plain and config.prefill_chunk_size is None and tokens > chunk:
            mask = call.model_kwargs.get("attention_mask")
            if mask is None or bool(mask.all()):
                config.prefill_chunk_size = math.ceil(tokens / math.ceil(tokens / chunk))


def _begin_anew() -> None:
    """Let every engine begin anew in the child of a fork."""
    for engine in list(_engines):
        engine._start()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
