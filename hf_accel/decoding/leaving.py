"""Whether rows that have ended leave their batch: where nobody can see it, and where it pays.

Stock gives a row that has ended padding to read until the last row ends. Here it leaves: the passes that follow have
fewer rows, and all around them is as it was, see `hf_accel.core.calls.present`. It pays where what is copied (a row for
each row that leaves before the last, and where half of the memory would be empty what remains) is read less often
than passes would read what leaves: a copy counts as three readings, and the others are expected to go on for as
long as they have been written, or until the maximal length.
"""

from __future__ import annotations

from typing import Any, Protocol

from hf_accel.core.calls.cache_rows import moves_single_rows
from hf_accel.core.calls.call import Call
from hf_accel.core.calls.present import Present
from hf_accel.core.drift import CACHE
from hf_accel.decoding.rows_left import RowsLeft
from hf_accel.decoding.staying import call_obstacle

COPY = 3  # readings that a copy takes as long as: the lines that are written are read before, and written back
TOO_FEW = "too few steps were left to pay for moving rows"


class Passes(Protocol):
    """What makes the forward passes of a call: `SingleTokens`, or a `Stepper`."""

    present: Present

    def rows_stay(self, rows: int) -> str | None: ...

    def leave(self, slots: list[int], *, gives_back: bool) -> int: ...


class Leaving:
    """Lets the rows of one call leave its passes."""

    def __init__(self, call: Call, passes: Passes, counts: RowsLeft) -> None:
        self._call, self._passes, self._counts = call, passes, counts
        self._stored, self._prompt_tokens = call.input_ids.shape  # rows that the cache has memory for
        self._maximum = int(call.generation_config.max_length or 0)
        self._is_looked_at = False
        self._reason: str | None = None  # why rows stayed, lately
        self._stay = False  # for good
        self._freed = 0

    def consider(self, ended: set[int], tokens: int) -> None:
        """Let rows that have ended leave, if that pays; tokens: of the longest row that goes on."""
        present = self._passes.present
        rows = present.batch - len(ended)
        gone = len(present.order) - rows
        if self._stay or not gone or not rows:
            return
        if not self._is_looked_at:
            self._is_looked_at, self._reason = True, call_obstacle(self._call)
            self._stay = self._reason is not None
            if self._stay:
                return
        slots = present.slots_without(ended)
        left = min(tokens - self._prompt_tokens, self._maximum - tokens)
        layers: list[Any] = getattr(self._call.model_kwargs.get(CACHE), "layers", [])
        moved = sum(map(int.__ne__, slots, range(rows))) if moves_single_rows(layers) else rows
        gives_back = 2 * rows <= self._stored and left * gone >= COPY * rows
        if not gives_back and left * gone < COPY * moved:
            self._reason = TOO_FEW
        elif (reason := self._passes.rows_stay(rows)) is not None:
            self._reason = reason
        else:
            self._freed += self._passes.leave(slots, gives_back=gives_back)
            self._stored = rows if gives_back else self._stored

    def close(self) -> None:
        """Count what became of the rows."""
        present = self._passes.present
        if not present.is_whole:
            self._counts.add(present.batch - len(present.order), present.saved, self._freed)
        elif self._reason is not None:
            self._counts.stay(self._reason)
