"""Everything that a caller can hand to `generate`, or hang on a model, made to raise at its n-th call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList


class Raised(Exception):
    """What the callbacks of these tests raise, beside KeyboardInterrupt."""


class At:
    """Raises `error` at its n-th call, counted from 0, and does nothing at the others."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.left, self.error = step, error

    def __call__(self, *_: Any, **__: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error


class Streamer:
    def __init__(self, put: Callable[[], None] | None = None, end: Callable[[], None] | None = None) -> None:
        self._put, self._end = put, end

    def put(self, value: torch.Tensor) -> None:
        if self._put is not None:
            self._put()

    def end(self) -> None:
        if self._end is not None:
            self._end()


def processor(at: At) -> dict[str, Any]:
    def process(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        at()
        return scores

    return {"logits_processor": LogitsProcessorList([process])}


def criterion(at: At) -> dict[str, Any]:
    def stop(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        at()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    return {"stopping_criteria": StoppingCriteriaList([stop])}


def prefix_allowed(at: At) -> dict[str, Any]:
    def allowed(batch: int, ids: torch.Tensor) -> list[int]:
        at()
        return list(range(8, 128))

    return {"prefix_allowed_tokens_fn": allowed}


GIVEN: dict[str, Callable[[At], dict[str, Any]]] = {
    "processor": processor,
    "criterion": criterion,
    "prefix_allowed": prefix_allowed,
    "streamer put": lambda at: {"streamer": Streamer(put=at)},
    "streamer end": lambda at: {"streamer": Streamer(end=at)},
}
HUNG: dict[str, Callable[[Any, At], Any]] = {
    "hook of the model": lambda model, at: model.register_forward_hook(at),
    "hook before a layer": lambda model, at: model.model.layers[1].register_forward_pre_hook(at),
    "hook of a product": lambda model, at: model.model.layers[0].mlp.down_proj.register_forward_hook(at),
    "hook of the head": lambda model, at: model.lm_head.register_forward_hook(at),
}
CALLBACKS = [*GIVEN, *HUNG]


@contextmanager
def raising(name: str, model: Any, step: int, error: BaseException) -> Iterator[dict[str, Any]]:
    """Yield the arguments of a call in which the callback raises; it hangs on `model` inside the block only."""
    at = At(step, error)
    if name in GIVEN:
        yield GIVEN[name](at)
        return
    handle = HUNG[name](model, at)
    try:
        yield {}
    finally:
        handle.remove()
