"""What layers of linear attention remember of a text, kept aside while a step reads tokens that may be taken back.

Keys and values are taken back by cropping; a state that every token changes is not. So it is copied before a step of
several tokens, and given back where some of them stay out: then the tokens that do stay are read again, as the first
of the next step. Cost: a copy of the states per such step, and rows of the steps after refused drafts.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

STATES = ("conv_states", "recurrent_states")
FLAGS = ("has_previous_state", "is_conv_states_initialized", "is_recurrent_states_initialized")
MIXIN: Any = getattr(cache_utils, "LinearAttentionCacheLayerMixin", ())
# layers that hold what the names above say and keys and values; others may hold more
KNOWN = frozenset(
    getattr(cache_utils, name, None)
    for name in (
        "LinearAttentionLayer",
        "LinearAttentionAndFullAttentionLayer",
        "LinearAttentionAndSlidingWindowAttentionLayer",
    )
)
EMPTY: Any = getattr(cache_utils, "DummyLayer", ())  # in the place of layers that cache nothing


def is_recurrent(layer: Any) -> bool:
    """Return whether a cache layer has states that every token changes."""
    return isinstance(layer, MIXIN)


def crop_attention(layer: Any, tokens: int) -> None:
    """Drop the last `tokens` tokens of a layer's keys and values, where it has some; of a window, end the recording."""
    if isinstance(layer, EMPTY):
        return
    if not is_recurrent(layer):
        layer.crop(-tokens)
    elif isinstance(layer, DynamicSlidingWindowLayer):
        DynamicSlidingWindowLayer.crop(layer, -tokens)
    elif isinstance(layer, DynamicLayer):
        DynamicLayer.crop(layer, -tokens)


class RecurrentStates:
    """The states of some layers of a cache, and a copy of them."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self._flags: list[tuple[Any, str, Any]] = []
        self._saved: list[tuple[Any, Any, torch.Tensor | None]] = []  # (owner, key, copy)

    @classmethod
    def of(cls, layers: list[Any]) -> RecurrentStates | None:
        """Return the states of those layers that have any, None where none has."""
        found = [layer for layer in layers if is_recurrent(layer)]
        return cls(found) if found else None

    def save(self) -> None:
        """Copy the states as they are now, into the memory of the last copy where that fits."""
        places = list(self._places())
        old = [copy for _, _, copy in self._saved]
        now = [_get(owner, key) for owner, key in places]
        copies: list[torch.Tensor | None] = []
        for index, state in enumerate(now):
            before = old[index] if index < len(old) else None
            fits = state is not None and before is not None and _is_like(state, before)
            copies.append(before if fits else None if state is None else torch.empty_like(state))
        pairs = [(to, state) for to, state in zip(copies, now, strict=True) if to is not None and state is not None]
        if pairs:
            torch._foreach_copy_([to for to, _ in pairs], [state for _, state in pairs])
        self._saved = [(owner, key, copy) for (owner, key), copy in zip(places, copies, strict=True)]
        self._flags = [
            (layer, name, _copied(getattr(layer, name)))
            for layer in self.layers
            for name in FLAGS
            if hasattr(layer, name)
        ]

    def give_back(self) -> None:
        """Put the states back as they were when they were copied; the copy stays."""
        to, copies = [], []
        for owner, key, copy in self._saved:
            state = _get(owner, key)
            if copy is not None and state is not None and _is_like(state, copy):
                to.append(state)  # in place: addresses may be known elsewhere
                copies.append(copy)
            else:
                _set(owner, key, None if copy is None else copy.clone())
        if to:
            torch._foreach_copy_(to, copies)
        for layer, name, flags in self._flags:
            setattr(layer, name, _copied(flags))

    def trim(self) -> None:
        """Let states that record their past, which those of convolutions do beside a window, forget what is over."""
        for layer in self.layers:
            sizes = getattr(layer, "conv_kernel_size", None)
            if not getattr(layer, "record_past", False) or not isinstance(sizes, dict):
                continue
            for key, state in layer.conv_states.items():
                if state is not None and sizes.get(key) and state.shape[-1] > sizes[key]:
                    layer.conv_states[key] = state[..., -sizes[key] :].clone()

    def _places(self) -> Any:
        for layer in self.layers:
            for name in STATES:
                states = getattr(layer, name, None)
                if isinstance(states, dict):
                    yield from ((states, key) for key in states)
                else:
                    yield layer, name


class Recall:
    """What recurrent states have read since they were copied, and what they have to read again.

    unread: tokens [B, n] at the ends of the rows that they have forgotten. reread: how many the latest pass read again.
    is_tentative: single tokens may be taken back, too. Rows are in step.
    """

    def __init__(self, states: RecurrentStates, unread: torch.Tensor | None = None) -> None:
        self._states, self.unread, self.is_tentative = states, unread, False
        self.reread = 0
        # how long rows were when states were copied, and what they have read since
        self._copied: tuple[int, list[torch.Tensor]] | None = None
        self._is_settled = True  # nothing of that will be taken back any more, but at the end of the call

    def read(self, ids: torch.Tensor, length: int) -> torch.Tensor:
        """Return what to read in a pass over tokens [B, T], with rows of `length` tokens that are not forgotten."""
        self.reread = 0
        if self.unread is not None:
            self.reread, ids = self.unread.shape[1], torch.cat([self.unread, ids], dim=1)
        if self.unread is not None and self._copied is not None:  # states are as they were copied
            self._copied = length, []
        elif self._is_settled:
            self._copied = None
            if self.is_tentative or ids.shape[1] > 1:
                self._states.save()
                self._copied = length, []
        if self._copied is not None:
            self._copied[1].append(ids)
        self.unread, self._is_settled = None, False
        return ids

    def keep(self, length: int, stop: int) -> int:
        """Let rows of `length` tokens hold their first `stop` ones, and return how many keys and values hold then.

        Raises:
            RuntimeError: states were not copied before the tokens that are taken back.
        """
        self._is_settled = stop == length
        if not self._is_settled:
            if self._copied is None or stop < self._copied[0]:
                raise RuntimeError("There is no copy of recurrent states from before the tokens that are taken back.")
            start, read = self._copied
            self._states.give_back()
            stay = torch.cat(read, dim=1)[:, : stop - start]
            self._copied = start, [stay]
            self.unread = stay if stay.shape[1] else None
        self._states.trim()
        return stop - (0 if self.unread is None else self.unread.shape[1])

    def take(self) -> torch.Tensor | None:
        """Return what was forgotten, which is now read for good."""
        tokens, self.unread, self._copied, self._is_settled = self.unread, None, None, True
        return tokens


def _get(owner: Any, key: Any) -> torch.Tensor | None:
    return owner[key] if isinstance(owner, dict) else getattr(owner, key, None)


def _set(owner: Any, key: Any, value: torch.Tensor | None) -> None:
    if isinstance(owner, dict):
        owner[key] = value
    elif hasattr(owner, key):
        setattr(owner, key, value)


def _copied(flags: Any) -> Any:
    return dict(flags) if isinstance(flags, dict) else flags


def _is_like(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
