"""Where the threads of calls meet for a step: who comes last runs it for all.

There is no thread of its own to start, to end or to lose in a fork. A step begins when every call that writes has
come, or when the first has waited long enough; whoever is late is in the next one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from hf_accel.batching.merged import Part


class Submission:
    """The inputs of one call's next token, and what becomes of them.

    key: what it has in common with those it may be run with.
    """

    def __init__(self, part: Part, inputs: dict[str, Any], key: Any) -> None:
        self.part, self.inputs, self.key = part, inputs, key
        self.outputs: Any = None
        self.error: BaseException | None = None
        self.is_done = False
        self.since = time.monotonic()
        self._woken = threading.Event()
        self.batch: list[Submission] | None = None  # what its thread is to run

    def wake(self) -> None:
        self._woken.set()

    def sleep(self, seconds: float | None) -> None:
        self._woken.wait(seconds)
        self._woken.clear()


class Meeting:
    """Brings the submissions of several threads together.

    run: makes one pass for a batch of them, to which it may `gather` more, and raises nothing.
    """

    def __init__(self, run: Callable[[list[Submission]], None], patience: float) -> None:
        self._run, self.patience = run, patience
        self._lock = threading.Lock()
        self._waiting: list[Submission] = []
        self._writers = 0  # calls whose next submission is to be expected
        self._is_running = False

    @property
    def writers(self) -> int:
        return self._writers

    def join(self) -> None:
        """Count one more call that writes."""
        with self._lock:
            self._writers += 1

    def leave(self) -> None:
        """Count one less: nobody need wait for it."""
        with self._lock:
            self._writers -= 1
            self._hand_over()

    def submit(self, mine: Submission) -> Any:
        """Wait for a pass that has it, or run that, and return the outputs of its rows.

        Raises: what the pass of this submission alone raised.
        """
        with self._lock:
            self._waiting.append(mine)
            mine.batch = self._due()
        try:
            self._await(mine)
        except BaseException:  # such as an interrupt: the others go on
            with self._lock:
                if mine.batch is not None and not mine.is_done:
                    self._waiting, self._is_running = mine.batch + self._waiting, False
                self._waiting = [other for other in self._waiting if other is not mine]
                self._hand_over()
            raise
        if mine.error is not None:
            raise mine.error
        return mine.outputs

    def gather(self, batch: list[Submission]) -> None:
        """Add to a batch that has its turn whatever came while it waited for that."""
        with self._lock:
            batch += [submission for submission in self._waiting if submission.key == batch[0].key]
            self._waiting = [submission for submission in self._waiting if submission.key != batch[0].key]

    def _await(self, mine: Submission) -> None:
        while not mine.is_done:
            if (batch := mine.batch) is not None:
                self._lead(batch)
                with self._lock:
                    if mine.batch is batch:  # else it was others' that could not be run with it, and its own comes next
                        mine.batch = None
                continue
            with self._lock:
                seconds = None if self._is_running else self._left()
            mine.sleep(seconds)
            with self._lock:
                if mine.batch is None and not mine.is_done:
                    mine.batch = self._due()

    def _lead(self, batch: list[Submission]) -> None:
        try:
            self._run(batch)
        finally:
            with self._lock:
                self._is_running = False
                for submission in batch:
                    if submission.outputs is None and submission.error is None and submission.batch is None:
                        self._waiting.append(submission)  # whoever ran it was interrupted before
                        continue
                    submission.is_done = True
                    submission.wake()
                self._hand_over()

    def _hand_over(self) -> None:
        """Let the thread of the oldest submission see to the next pass, or to when it begins."""
        if self._waiting and not self._is_running:
            oldest = self._waiting[0]
            oldest.batch = self._due()
            oldest.wake()

    def _left(self) -> float:
        """Return how many seconds the oldest submission still waits for others."""
        return max(0.0, self._waiting[0].since + self.patience - time.monotonic()) if self._waiting else self.patience

    def _due(self) -> list[Submission] | None:
        """Return what is to be run now, which counts as running then; None: not yet."""
        if self._is_running or not self._waiting or (len(self._waiting) < self._writers and self._left() > 0):
            return None
        key = self._waiting[0].key
        batch = [submission for submission in self._waiting if submission.key == key]
        self._waiting = [submission for submission in self._waiting if submission.key != key]
        self._is_running = True
        return batch
