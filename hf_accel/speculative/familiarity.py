"""Inputs that setting up did not try, of images or with positions of several axes: tried in the first call with them.

Three tokens are taken in one by one after the call's own prompt, then in one step and, in a batch, by rows that are
apart; all of them are taken back. Cost: four to six passes, once per kind of inputs.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch

from hf_accel.core.calls.call import Call
from hf_accel.core.calls.following import Following
from hf_accel.core.calls.forward import Stepper
from hf_accel.errors import described
from hf_accel.speculative.proof import OTHER, Tolerance, difference_of

TOKENS = 3


class Familiarity:
    """What was found of each kind of inputs of a model, over all its calls."""

    def __init__(self) -> None:
        self._found: dict[tuple[frozenset[str], bool], str | None] = {}
        self._lock = threading.Lock()

    def obstacle(self, call: Call, inputs: Following, stepper: Stepper, logits: torch.Tensor) -> str | None:
        """Return why steps with these inputs cannot be verified, None if they can.

        stepper: over the call's cache, which is as it was afterwards. logits: [B, 1, V], after the prompt.
        """
        kind = _kind(call.model, inputs, stepper)
        if not kind:
            return None
        key = kind, len(stepper.lengths) > 1
        if key not in self._found:
            context = getattr(call.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
            if isinstance(context, int) and call.input_ids.shape[1] + TOKENS > context:
                return "too near the end of the context to try inputs of a new kind"
            reason = _tried(stepper, call.input_ids, logits)
            with self._lock:
                self._found[key] = reason and f"{reason}, with {', '.join(sorted(kind))}"
        return self._found[key]


def _kind(model: Any, inputs: Following, stepper: Stepper) -> frozenset[str]:
    kind = inputs.kind
    if inputs.positions is None and "position_ids" in inspect.signature(model.forward).parameters:
        kind |= {"no positions"}
    if inputs.mask is not None and stepper.recall is not None:
        kind |= {"a mask"}
    return kind


@torch.no_grad()
def _tried(stepper: Stepper, prompt: torch.Tensor, logits: torch.Tensor) -> str | None:
    """Return why steps after a prompt [B, S] that gave logits [B, 1, V] cannot be verified.

    What leaves a window is forgotten once tokens are known to stay, so rows never go back behind where they were.
    """
    start, tolerance = list(stepper.lengths), Tolerance.of(stepper.model)
    if stepper.recall is not None:
        stepper.recall.is_tentative = True
    expected = [logits]
    tokens = [prompt[:, -1:]]
    try:
        for _ in range(TOKENS):
            tokens.append(expected[-1].argmax(dim=-1).to(prompt.device))
            expected.append(stepper.forward(tokens[-1]))
        if len(start) > 1 and not tolerance.typical(_apart(stepper, start, tokens, expected)) <= tolerance.limit:
            return "rows of different lengths get other results than alone"
        _take_back(stepper, start)
        several = stepper.forward(torch.cat(tokens[1:], dim=1))
        if not tolerance.typical(difference_of(several, torch.cat(expected[1:], dim=1))) <= tolerance.limit:
            return OTHER
    except Exception as error:  # whatever a model raises that takes single tokens only
        return f"steps of several tokens fail: {described(error)}"
    finally:
        _take_back(stepper, start)
    return None


def _apart(
    stepper: Stepper, start: list[int], tokens: list[torch.Tensor], expected: list[torch.Tensor]
) -> torch.Tensor:
    """Return how far rows are off where the first is a token ahead of others, which read the prompt's last again."""
    stepper.keep([length - (row > 0) for row, length in enumerate(start)])
    found = stepper.forward(torch.cat([torch.cat(tokens[1:3], dim=1)[:1], torch.cat(tokens[:2], dim=1)[1:]]))
    return difference_of(found, torch.cat([torch.cat(expected[1:3], dim=1)[:1], torch.cat(expected[:2], dim=1)[1:]]))


def _take_back(stepper: Stepper, lengths: list[int]) -> None:
    """Let all rows be so long again, even where some layers have taken in tokens and others have not."""
    stepper.lengths = [length + 1 for length in lengths]
    stepper.keep(lengths)
    if stepper.is_ragged:
        stepper.is_ragged = False
        for layer in stepper.cache.layers:
            layer.crop(0)  # its rows are in step again
