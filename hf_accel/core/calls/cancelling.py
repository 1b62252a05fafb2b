"""Calls that are no longer wanted: whoever made one says so, and it ends before its next pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from hf_accel.errors import CancelledCallError

_SWITCH: ContextVar[threading.Event | None] = ContextVar("what cancels hf_accel calls", default=None)


@contextmanager
def cancellable(switch: threading.Event) -> Iterator[None]:
    """Let the `generate` calls in the block end with a CancelledCallError before their next pass once `switch` is set.

    It is looked at where batching is applied, by calls that wait for a place, and before every pass.
    """
    token = _SWITCH.set(switch)
    try:
        yield
    finally:
        _SWITCH.reset(token)


def check_wanted() -> None:
    """Raise CancelledCallError where the call in progress is no longer wanted."""
    switch = _SWITCH.get()
    if switch is not None and switch.is_set():
        raise CancelledCallError("This generate call was cancelled by whoever made it; nothing of it is left.")
