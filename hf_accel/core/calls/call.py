"""One `generate` call: what was asked, what stock made of it, and how calls are counted."""

from __future__ import annotations

import enum
import functools
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_accel.core.model.rope import MovingRope, moving_rope


@dataclass
class Request:
    """What `generate` was asked before transformers changed it.

    options: our own keywords, as their owners understood them. standing: who stands at doors for this call only.
    latest: by who runs passes, what the latest one leaves for the next; it is gone with the call.
    """

    options: dict[str, Any] = field(default_factory=dict)
    standing: dict[enum.Enum, Any] = field(default_factory=dict)
    has_callers_cache: bool = False
    latest: dict[Any, Any] = field(default_factory=dict)
    number: int = field(default_factory=itertools.count(1).__next__)  # which no other has

    @property
    def tenant(self) -> str:
        """Whose call it is; by default nobody's."""
        return str(self.options.get("tenant", ""))


IN_PROGRESS: ContextVar[Request | None] = ContextVar("the hf_accel request in progress", default=None)

request_in_progress: Callable[[], Request | None] = IN_PROGRESS.get
"""Return the `generate` call of an optimised model that this thread is in, None outside of one."""


@dataclass
class Call:
    """The arguments of one decoding loop, as stock `generate` prepared them."""

    model: Any
    input_ids: torch.Tensor  # [B, T]
    logits_processor: Any
    stopping_criteria: Any
    generation_config: Any
    synced_gpus: bool
    streamer: Any
    model_kwargs: dict[str, Any]
    request: Request = field(default_factory=Request)
    doors: Mapping[enum.Enum, Any] = field(default_factory=dict)  # who stands where, see `hf_accel.core.calls.doors`

    @property
    def has_callers_cache(self) -> bool:
        return self.request.has_callers_cache

    @functools.cached_property
    def rope(self) -> MovingRope | None:
        """What moves the rotary embeddings of the model; None: nothing does."""
        return moving_rope(self.model)

    def stock_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments that `_sample` was called with."""
        return {
            "logits_processor": self.logits_processor,
            "stopping_criteria": self.stopping_criteria,
            "generation_config": self.generation_config,
            "synced_gpus": self.synced_gpus,
            "streamer": self.streamer,
            **self.model_kwargs,
        }


class CallLog:
    """Counts the `generate` calls of one model: served by our loop, or delegated to stock and why."""

    def __init__(self) -> None:
        self.served = 0
        self.delegated = 0
        self.reasons: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._open = threading.local()

    @contextmanager
    def counting(self) -> Any:
        """Count the `generate` call made inside the block; calls nested in it, and failed ones, do not count."""
        depth = getattr(self._open, "depth", 0)
        self._open.depth = depth + 1
        if depth == 0:
            self._open.reason = "the call did not reach a token loop"
        try:
            yield
        finally:
            self._open.depth = depth
        if depth:
            return
        reason = self._open.reason
        with self._lock:
            if reason:
                self.delegated += 1
                self.reasons[reason] += 1
            else:
                self.served += 1

    def note(self, reason: str) -> None:
        """Remember why the call in progress is delegated; the empty string means it is served."""
        if getattr(self._open, "depth", 0) == 1:
            self._open.reason = reason

    def to_dict(self) -> dict[str, Any]:
        return {"served": self.served, "delegated": self.delegated, "reasons": dict(self.reasons)}


@dataclass
class NewCache:
    """A cache that `generate` has just made for `model`, and what is known of the call that it is for.

    rows: B, with beams and returned sequences; expected_tokens: of the prompt and new ones; mask: [B, T] or None.
    """

    cache: Any
    model: Any
    mode: Any
    rows: int
    expected_tokens: int
    mask: torch.Tensor | None
