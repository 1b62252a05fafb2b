"""Stop strings over text that comes in pieces: what may be the beginning of one is held back."""

from __future__ import annotations


class StopText:
    """Lets text through up to the first stop string.

    The first is the one that is complete first, so that the result does not depend on where pieces end; of several
    that are complete at the same character, the longest.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops, self._held = stops, ""
        self.is_found = False

    def add(self, text: str) -> str:
        """Return the text that is certain to be before a stop string."""
        self._held += text
        found = [
            (self._held.find(stop) + len(stop), self._held.find(stop)) for stop in self._stops if stop in self._held
        ]
        if found:
            self.is_found = True
            shown, self._held = self._held[: min(found)[1]], ""
            return shown
        held = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - held
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """Return what was held back, now that no more text comes."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with, and that is not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
