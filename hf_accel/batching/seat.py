"""The place of one call beside others."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Any

from hf_accel.batching.admission import Place
from hf_accel.batching.meeting import Meeting
from hf_accel.batching.merged import Part
from hf_accel.batching.statistics import BatchingStatistics
from hf_accel.batching.turn import Turn
from hf_accel.core.calls.cancelling import check_wanted


class Seat:
    """As a context it wraps each step of the call: what brings its next token.

    place: what the call takes up. part: its rows; None: its passes run beside the batch.
    """

    def __init__(
        self, turn: Turn, meeting: Meeting, statistics: BatchingStatistics, place: Place, part: Part | None
    ) -> None:
        self._of_passes, self._meeting, self._statistics = turn, meeting, statistics
        self.place, self.part = place, part
        self.is_writing = False
        self._last: float | None = None
        self._turn: AbstractContextManager[None] | None = None

    @property
    def number(self) -> int:
        return self.place.number

    def write(self) -> None:
        """Note that the call writes from here on: steps wait for it."""
        if not self.is_writing:
            self.is_writing = True
            self._meeting.join()

    def close(self) -> None:
        """Note that the call writes no more."""
        if self.is_writing:
            self.is_writing = False
            self._meeting.leave()

    def __enter__(self) -> Seat:
        check_wanted()
        if self.part is None:  # all passes of a step, of drafts and their verification, at one turn
            turn = self._of_passes.taken(self.number)
            turn.__enter__()
            self._turn = turn
        return self

    def __exit__(self, *error: Any) -> None:
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.__exit__(*error)
        now = time.perf_counter()
        if self._last is not None:
            self._statistics.gap(now - self._last)
        self._last = now


class Within:
    """Wraps the steps of a call within a call, made by a criterion or a processor: the place is the outer one's."""

    def __enter__(self) -> None:
        check_wanted()

    def __exit__(self, *error: Any) -> None:
        return None
