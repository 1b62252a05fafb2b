"""Errors that are not of our tree become the cause of one that is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hf_accel.errors import HfAccelError, described


@contextmanager
def converting(kind: type[HfAccelError], what: str, advice: str = "") -> Iterator[None]:
    """Turn an error that is not of this tree into one that is: `what` failed, why, and what to do; it is the cause."""
    try:
        yield
    except HfAccelError:
        raise
    except Exception as error:
        raise kind(f"{what} ({described(error)}).{advice and ' ' + advice}") from error
