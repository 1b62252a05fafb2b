"""Where families may stand in what is done with an optimised model, and what is expected of who stands there."""

from __future__ import annotations

import enum
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from hf_accel.core.calls.call import Call, NewCache


class Door(enum.Enum):
    """The doors, each with the protocol of who stands there. One stands at each; a call may bring its own.

    GENERATE: `CallServer`, asked before stock `generate` begins.
    NEW_CACHE: `CacheMaker`. PREFILL: `PromptReader`. PADDED_PROMPT: `PaddedPromptReader`. TOKEN_LOOP: `TextWriter`.
    SCHEDULE: `Scheduler`, asked by the token loop when passes may run.
    FORWARD: a function with the arguments and outputs of the model, for passes after the prompt.
    DRAFTS: `hf_accel.core.calls.drafting.Speculation`, asked by the token loop.
    DRAFT_CACHE: a function (cache, expected tokens), for the caches of models that draft.
    CONTINUOUS_BATCHING: a function, called before transformers' manager of continuous batching is made.

    Saving has no door here: what stands as `model.hf_quantizer` is asked, by transformers and by us.
    """

    GENERATE = "generate"
    NEW_CACHE = "new cache"
    PREFILL = "prefill"
    PADDED_PROMPT = "padded prompt"
    TOKEN_LOOP = "token loop"
    SCHEDULE = "schedule"
    FORWARD = "forward"
    DRAFTS = "drafts"
    DRAFT_CACHE = "draft cache"
    CONTINUOUS_BATCHING = "continuous batching"


class CallServer(Protocol):
    """Serves whole `generate` calls: says what it cannot serve, and serves the rest."""

    def obstacle(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None: ...

    def serve(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


class CacheMaker(Protocol):
    """Gives the caches that `generate` makes their layers."""

    def fill(self, new: NewCache) -> None: ...

    def bits(self, new: NewCache) -> tuple[int | None, str | None]:
        """Return in how many bits the cache would keep positions (None: as they are), and why others may not keep them.

        The latter is None where it would keep every position on the device, and nothing beside.
        """
        ...


class PromptReader(Protocol):
    """Wraps the forward pass over the prompt, for which it may know keys and values already."""

    def prefilling(
        self, model: Any, input_ids: Any, generation_config: Any, kwargs: dict[str, Any], tenant: str | None
    ) -> AbstractContextManager[None]: ...


class PaddedPromptReader(Protocol):
    """Reads a prompt in place of the forward pass over it, which `run` is; None: that has to read it."""

    def read(
        self,
        model: Any,
        input_ids: Any,
        generation_config: Any,
        kwargs: dict[str, Any],
        run: Callable[[Any, dict[str, Any]], Any],
    ) -> Any: ...


class TextWriter(Protocol):
    """Writes text token by token: says what it cannot serve, and serves the rest."""

    def obstacle(self, call: Call) -> str | None: ...

    def run(self, call: Call) -> Any: ...


class Scheduler(Protocol):
    """Says when the passes of a call may run, beside those of other threads."""

    def seated(self, call: Call, reason: str | None) -> AbstractContextManager[AbstractContextManager[Any]]:
        """Wait until the call may begin, and wrap it; what is given wraps each of its steps.

        reason: why its passes are not those of one token each, None if they are.
        """
        ...


class SharedBuffers(Protocol):
    """What holds the buffers of one call's cache while calls join: given when the call may begin, not when it is made.

    joins: whether the steps of the call are made together with those of others.
    """

    def has_room(self, joins: bool) -> bool:
        """Return whether the call can be given buffers now; if not, it is better off waiting."""
        ...

    def reserve(self, joins: bool) -> None:
        """Let nobody else have them: the call begins."""
        ...

    def settle(self) -> str | None:
        """Prepare them where no pass is under way, and return why the call cannot join others, None if it can."""
        ...

    def release(self) -> None:
        """Give them up: the call is over. Who keeps its cache has what it holds."""
        ...


class Sharing(Protocol):
    """Gives the caches of calls buffers while calls join. rows: of the most calls at once; 0: none can be merged."""

    rows: int

    def claim_of(self, cache: Any) -> SharedBuffers | None: ...

    def group_of(self, cache: Any) -> Any:
        """Return what caches have in common whose calls can be merged into one pass, None where it is nothing."""
        ...


class SharingRunner(Protocol):
    """What may stand at `Door.FORWARD`: passes that need buffers of their own, which calls that join can share.

    sharing: None while they do not. `share(rows, positions)` begins it, for calls of so many rows in all, whose caches
    hold so many positions at most (None: no bound is known), and returns what ends it.
    """

    @property
    def sharing(self) -> Sharing | None: ...

    def share(self, rows: int, positions: int | None) -> Callable[[], None]: ...


MAKERS: dict[Door, Callable[[], Any]] = {}
"""Who can be called to a door where a call needs somebody and nobody stands: a call with drafts needs a token loop."""
