"""Sending a request again where its replica died with it: how often, how long, and what is told then.

Ray Serve routes a request anew while no replica has accepted it. One that was accepted is lost with its replica, and
its caller is told so by an ActorDiedError (`_route_and_send_request_once` in ray/serve/_private/router.py of ray 2.60).
As an answer depends on nothing but the request and has no effects, it can be asked for again.
"""

from __future__ import annotations

import time
from types import TracebackType

from hf_accel.errors import ReplicaError, described


class Tries:
    """The tries of one request: `while True: with tries.another(): return ...`; what says that a replica died is taken.

    lost: the errors that say so. timeout_s: of all tries together; None: no limit.
    """

    def __init__(self, most: int, timeout_s: float | None, lost: tuple[type[BaseException], ...]) -> None:
        self.most, self.lost = most, lost
        self.timeout_s = timeout_s
        self._until = None if timeout_s is None else time.monotonic() + timeout_s
        self._made = 0
        self._last: BaseException | None = None

    def another(self) -> Tries:
        """Begin a try, to be entered.

        Raises:
            ReplicaError: as many replicas died with the request as there are tries.
        """
        if self._made == self.most:
            why = "" if self._last is None else f" ({described(self._last)})"
            raise ReplicaError(
                f"{self.most} replicas died with this request, one after the other{why}. If it is what ends them, as "
                "one that takes more memory than there is, change it. Otherwise send it again, or allow more tries=..."
            ) from self._last
        self._made += 1
        return self

    @property
    def left_s(self) -> float | None:
        """Seconds that are left to all tries; None: no limit."""
        return None if self._until is None else max(0.0, self._until - time.monotonic())

    def __enter__(self) -> Tries:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """Take what says that a replica died.

        Raises:
            ReplicaError: no answer came in time.
        """
        if isinstance(error, TimeoutError) and self.left_s is not None and self.left_s < 0.1:
            raise ReplicaError(
                f"No replica answered within {self.timeout_s:g} s. Give more time, more replicas, or fewer requests."
            ) from error
        if isinstance(error, self.lost):
            self._last = error
            return True
        return False
