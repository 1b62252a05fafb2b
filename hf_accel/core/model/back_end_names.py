"""A back end's name in the config of a model, which models that compare names take for the stock one it stands for."""

from __future__ import annotations

from typing import Any, SupportsIndex


class BackEndName(str):
    """The name of a back end in the config of an optimised model; copies and pickles of it say what it `stands_for`.

    A deep copy or a saved pickle of an optimised model is a stock model, which works where hf_accel is not installed.
    Models that compare the name, to choose the form of their masks, find it equal to "sdpa", whose masks this takes;
    its hash is that of its own letters, so that registries, which are dictionaries, keep the two apart.

    ladder: what answers the prompts of the model that has this very name; None: stock's attention.
    """

    stands_for: str
    ladder: Any

    def __new__(cls, letters: str, stands_for: str = "sdpa", ladder: Any = None) -> BackEndName:
        made = super().__new__(cls, letters)
        made.stands_for, made.ladder = stands_for, ladder
        return made

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or other == self.stands_for

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:  # written out: torch.compile traces no hash of C
        return str.__hash__(str(self))

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[type, tuple[str]]:
        return str, (self.stands_for,)

    def with_ladder(self, ladder: Any) -> BackEndName:
        """Return the same name for one model, whose prompts `ladder` answers."""
        return BackEndName(str(self), self.stands_for, ladder)
