"""Stands where passes run: those of concurrent calls become one, the others take turns with it."""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from hf_accel.batching.admission import Admission
from hf_accel.batching.config import BatchingConfig
from hf_accel.batching.joining import fits, follow_rows, hooks_of, joining_obstacle, part_of
from hf_accel.batching.meeting import Meeting, Submission
from hf_accel.batching.pace import Pace
from hf_accel.batching.passes import Passes
from hf_accel.batching.seat import Seat, Within
from hf_accel.batching.statistics import BatchingStatistics
from hf_accel.batching.stopwatch import Stopwatch
from hf_accel.batching.turn import Turn
from hf_accel.core.calls.call import Call
from hf_accel.core.calls.cancelling import check_wanted
from hf_accel.core.calls.doors import SharedBuffers, Sharing
from hf_accel.core.drift import CACHE
from hf_accel.errors import CancelledCallError

ONE_CALL = "steps are captured over the buffers of one call, so that calls run one after the other"
NO_BUFFERS = "its steps are not captured, and those of other calls are"
_latest: Any = itertools.count(1)
_engines: Any = weakref.WeakSet()  # of this process


class Engine:
    """Merges the passes of one model's calls.

    inner: runs a pass with the arguments of the model's forward: who stood at the door before, or the model.
    """

    def __init__(self, model: Any, config: BatchingConfig, inner: Callable[..., Any] | None) -> None:
        self._model, self.config, self._inner, self._device = weakref.ref(model), config, inner, model.device
        self.statistics = BatchingStatistics(None if config.latency_ms is None else config.latency_ms / 1e3)
        self._sharing: Sharing | None = getattr(inner, "sharing", None)
        self._hooks: list[Any] = []  # dictionaries, as modules have them
        self.pace = Pace(self.statistics.latency_s, config.max_rows, config.chunk_tokens)
        self._start()
        _engines.add(self)

    def _start(self) -> None:
        """Begin with nobody inside: also in the child of a fork, where the threads of the others are gone."""
        self.turn, self._local, self._watch = Turn(), threading.local(), Stopwatch(self._device)
        self.admission = Admission(self.config.max_rows, self.config.max_tokens, self.pace.most_rows)
        self.passes = Passes(self.turn, self.pace, self._watch, self.statistics, self.run)
        self.meeting = Meeting(self.passes.run, self.config.max_wait_ms / 1e3)
        self.passes.gather = self.meeting.gather

    def run(self, **inputs: Any) -> Any:
        """Run a pass by whoever ran it before, whose turn it is."""
        inner = self._inner or self._model()
        return inner(**inputs)  # type: ignore[misc]

    @contextmanager
    def passing(self, tokens: int) -> Iterator[None]:
        """Wrap a pass of the model over so many tokens per row that no meeting makes: it waits for its turn."""
        if self.turn.is_mine:  # within a step, which may be for other calls than this thread's, or a capture of one
            yield
            return
        check_wanted()
        seat = self._seat
        with self.turn.taken(next(_latest) if seat is None else seat.number):
            begin = self._watch.now()
            yield
            if tokens > 1:
                self._watch.tell(begin, self._watch.now(), partial(self.pace.prompt, tokens))

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
            with self.turn.taken(seat.number, is_step=True):
                begin = self._watch.now()
                outputs = self.run(**inputs)
                self._note(seat, begin)
                return outputs
        cache, sharing = seat.part.cache, self._sharing
        group = None if sharing is None else sharing.group_of(cache)
        key = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), type(cache), group
        return self.meeting.submit(Submission(seat.part, inputs, key))

    def follow(self, cache: Any) -> torch.Tensor | None:
        """Return the tokens that follow greedily, where nobody else writes. See `SingleTokens.follow`."""
        follow, seat = getattr(self._inner, "follow", None), self._seat
        if follow is None or seat is None or not self._goes_alone():
            return None
        with self.turn.taken(seat.number, is_step=True):
            begin = self._watch.now()
            found: torch.Tensor | None = follow(cache)
            if found is not None:
                self._note(seat, begin)
            return found

    def _goes_alone(self) -> bool:
        """Return whether a step of this call is better made at once than with those of others."""
        # a hook that was put on in the middle of a call is to see the call alone
        return self.meeting.writers < 2 or any(self._hooks) or not self.pace.merges(self.meeting.writers)

    def _note(self, seat: Seat, begin: Any) -> None:
        """Note what a step of one call took."""
        rows = seat.part.rows if seat.part else 1
        self._watch.tell(begin, self._watch.now(), partial(self.pace.step, rows))

    @contextmanager
    def seated(self, call: Call, reason: str | None) -> Iterator[Any]:
        """Give a call its seat, once there is room for it. See `hf_accel.core.calls.doors.Scheduler`."""
        sharing, cache = self._sharing, call.model_kwargs.get(CACHE)
        buffers = None if sharing is None else sharing.claim_of(cache)
        with ExitStack() as stack:
            if self._seat is not None:
                self._settle(buffers, self._seat.number, stack)
                yield Within()
                return
            begin, rows = time.perf_counter(), len(call.input_ids)
            reason = reason or joining_obstacle(call)
            self._hooks = hooks_of(call.model)
            if sharing is not None and (not sharing.rows or buffers is None):
                reason = reason or (NO_BUFFERS if sharing.rows else ONE_CALL)
            tokens = rows * int(call.generation_config.max_length or call.input_ids.shape[1])
            place = self.admission.enter(rows, tokens, check_wanted, buffers, joins=reason is None)
            stack.callback(self.admission.leave, place)
            own = self._settle(buffers, place.number, stack)
            reason = reason or own
            seat = Seat(self.turn, self.meeting, self.statistics, place, None if reason else part_of(call))
            stack.callback(self._leave, seat)
            try:
                self._local.seat = seat
                self.statistics.began(reason, time.perf_counter() - begin)
                if seat.part is not None and self.admission.rows > rows:
                    self._chunk(call)
                yield seat
            except CancelledCallError:
                self.statistics.was_cancelled()
                raise

    def _settle(self, buffers: SharedBuffers | None, number: int, stack: ExitStack) -> str | None:
        """Let a cache have its buffers until the stack ends, and return why they are none to join others with."""
        if buffers is None:
            return None
        stack.callback(buffers.release)
        with self.turn.taken(number):
            return buffers.settle()

    def _leave(self, seat: Seat) -> None:
        self._local.seat = None
        seat.close()
        self.passes.forget()

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
