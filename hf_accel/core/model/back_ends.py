"""The attention back ends whose behaviour is known, by the names under which configs and transformers have them.

One list, which native layers, rows that advance apart and what is watched ask. transformers' own are here; families add
theirs on import.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Masks = Literal["boolean", "additive"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BackEnd:
    """What an attention back end does with what it is given.

    masks: the form [B, 1, T, S] that it takes: "boolean" where True is visible, a summand too; "additive" for a summand
        alone; None for another form, so that no mask of ours can be given to it and no native layer stand in for it.
    soft_caps: whether it caps scores softly where the model asks for it.
    reads_held: whether it takes keys and values as a cache holds them (`core.calls.held`), and asks for no tensors.
    """

    name: str
    masks: Masks | None
    soft_caps: bool = False
    reads_held: bool = False


BACK_ENDS: dict[str, BackEnd] = {}


def add_back_end(back_end: BackEnd) -> None:
    """Add a back end to the list, on import: who watches models takes the list as it is then."""
    BACK_ENDS[back_end.name] = back_end


def masks_of(name: str) -> Masks | None:
    """Return the form of the masks that the back end `name` takes; None for another form, or an unknown back end."""
    found = BACK_ENDS.get(name)
    return None if found is None else found.masks


add_back_end(BackEnd(name="eager", masks="additive", soft_caps=True))
add_back_end(BackEnd(name="sdpa", masks="boolean"))
