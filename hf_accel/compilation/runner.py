"""Stands where forward passes after the prompt are run: replays a captured step, or lets the model run as it is.

One capture per model, slot and number of tokens, of which there are few: steps of several tokens are filled up to the
next. A capture is made when it will pay back, and everything that goes wrong in one leaves steps eager, with a reason.
"""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.compilation.caches import StaticCaches
from hf_accel.compilation.call_layers import CallLayer
from hf_accel.compilation.capture import Capture
from hf_accel.compilation.joint import JointSteps, taking_part
from hf_accel.compilation.shared import FirstRows
from hf_accel.compilation.sharing import Sharing
from hf_accel.compilation.slots import Slot, Slots
from hf_accel.compilation.statistics import CompilationStatistics
from hf_accel.compilation.step import StaticStep, StepResults
from hf_accel.core.calls.call import request_in_progress
from hf_accel.core.calls.forward import StepOutputs, understood_inputs
from hf_accel.core.drift import CACHE
from hf_accel.errors import described

TOKENS = (1, 2, 4, 8, 16)  # of steps that are captured
PAYS_BACK = 16  # replays that a capture takes to pay back, about
_number = itertools.count()


@dataclass
class Recorded:
    """A captured step, and what replays it."""

    step: StaticStep
    replay: Callable[[], StepResults]


def record(model: Any, slot: Slot, tokens: int, capture: Capture, make_step: Callable[..., StaticStep]) -> Recorded:
    """Capture the step of `tokens` tokens at the lengths that the slot has now. Raises: as `Capture.capture`."""
    step = make_step(model, slot, tokens)
    return Recorded(step, capture.capture(step.run, step.run_and_advance))


class StaticRunner:
    """Runs the steps of one model. See `hf_accel.core.calls.doors.Door.FORWARD`.

    layers: indices of the cache's layers that the model uses; None: all.
    """

    def __init__(
        self,
        model: Any,
        slots: Slots,
        capture: Capture,
        statistics: CompilationStatistics,
        layers: list[int] | None = None,
        make_step: Callable[..., StaticStep] = StaticStep,
    ) -> None:
        self._model = weakref.ref(model)  # the model refers to what stands at its doors
        self.slots, self.capture, self.statistics, self.layers = slots, capture, statistics, layers
        self.make_step, self._understood = make_step, understood_inputs(model)
        self._key = next(_number)
        positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self._positions = int(positions or 2**62)
        self.obstacle: str | None = None  # found in a capture, for good
        self.caches: StaticCaches | None = None  # who makes the caches that calls may share buffers of
        self._joint = JointSteps(self._of_rows, statistics.replayed)
        self._latest: tuple[Recorded, list[CallLayer]] | None = None  # a step of one token, and the layers of its cache

    def __call__(self, **inputs: Any) -> Any:
        """Return the outputs of the model for these inputs."""
        model: Any = self._model()
        calls = taking_part(inputs.get(CACHE)) if self.layers is None else []
        found: Any = self._inputs_obstacle(inputs)
        if found is None:
            found = self._joint(calls, inputs) if calls else self._step_for(model, inputs)
        if isinstance(found, str):
            self.statistics.ran_eagerly(found)
            return model(**inputs)
        return found if calls else self._replayed(found, inputs)

    def follow(self, cache: Any) -> torch.Tensor | None:
        """Run the step that takes in what the latest one chose, and return what it chooses, int64 [B, 1].

        None where something came between, or a step of another kind is next. Costs the host one launch and one copy.
        """
        if self._latest is None or cache.layers is not self._latest[0].step.follows:
            return self._joint.follow(cache)
        recorded, layers = self._latest
        slot, length, request = recorded.step.slot, layers[0].length, request_in_progress()
        if (
            request is None
            or slot.request() is not request
            or slot.on_device != [length] * slot.rows
            or slot.graphs.get((self._key, 1)) is not recorded
            or length + 1 > slot.capacity
            or any(layer.slot is not slot or layer.length != length or layer.rows is not None for layer in layers)
        ):
            self._latest = None
            return None
        choices = recorded.replay().choices.clone()
        self._count(recorded, layers, 1)
        return choices

    def _count(self, recorded: Recorded, layers: list[CallLayer], tokens: int) -> None:
        recorded.step.slot.advanced(recorded.step.tokens)
        for layer in layers:
            layer.advance(tokens)
        self.statistics.replayed()

    def share(self, rows: int, positions: int | None) -> Callable[[], None]:
        """See `hf_accel.core.calls.doors.SharingRunner`."""
        caches: Any = self.caches
        if caches is None or not self.capture.one_call:
            return lambda: None
        # compiled layers would be compiled anew for each number of rows
        caches.sharing = Sharing(self.slots, self.statistics, rows if self.make_step is StaticStep else 0, positions)

        def undo() -> None:
            caches.sharing.rows = 0  # of calls that still wait to begin
            caches.sharing = None
            self.slots.shared = []
            self._joint.forget()

        return undo

    @property
    def sharing(self) -> Sharing | None:
        """See `hf_accel.core.calls.doors.SharingRunner`."""
        return None if self.caches is None else self.caches.sharing

    def _inputs_obstacle(self, inputs: dict[str, Any]) -> str | None:
        """Return why no captured step serves such inputs, whatever the cache is; None if one may."""
        if self.obstacle is not None:
            return self.obstacle
        ids = inputs.get("input_ids")
        kept = inputs.get("logits_to_keep") or 0
        if not isinstance(kept, int) or 0 < kept < (0 if ids is None else ids.shape[1]):
            return "the model is asked for some of the logits"
        if unknown := [name for name, value in inputs.items() if name not in self._understood and value is not None]:
            return f"the model is given {unknown[0]}"
        if ids is None or inputs.get("position_ids") is None:
            return "the model is not given tokens and their positions"
        return None

    def _step_for(self, model: Any, inputs: dict[str, Any]) -> Recorded | str:
        """Return the captured step that serves these inputs, or why there is none."""
        cache, ids, positions = (inputs[name] for name in (CACHE, "input_ids", "position_ids"))
        layers = self._layers_of(cache)
        slot = layers[0].slot if layers else None
        if not isinstance(slot, Slot):
            return "the cache has no fixed buffers"
        if slot.request() is not request_in_progress():
            return "the cache is of another call"
        lengths = layers[0].row_lengths(slot.rows)
        if any(layer.slot is not slot or layer.row_lengths(slot.rows) != lengths for layer in layers):
            return "layers of the cache have different lengths"
        if ids.shape[0] != slot.rows or positions.shape[-1] != ids.shape[1]:
            return "the inputs are of another shape than the cache"
        tokens = next((size for size in TOKENS if size >= ids.shape[1]), None)
        if tokens is None:
            return f"steps of more than {TOKENS[-1]} tokens"
        if max(lengths) + tokens > slot.capacity or (
            tokens > ids.shape[1] and max(lengths) + tokens > self._positions  # of filler, there is no embedding
        ):
            return "the end of the buffers or of the context is near"
        return self._recorded(model, slot, tokens, lengths, slot.expected - max(lengths))

    def _layers_of(self, cache: Any) -> list[CallLayer]:
        """Return the layers of a cache that this model uses, none where others than ours are among them."""
        found = getattr(cache, "layers", [])
        if self.layers is not None:
            found = [found[index] for index in self.layers]
        return found if all(isinstance(layer, CallLayer) for layer in found) else []

    def _of_rows(self, first: FirstRows, lengths: list[int], left: int) -> Recorded | str:
        return self._recorded(self._model(), first, 1, lengths, left)

    def _recorded(self, model: Any, slot: Slot, tokens: int, lengths: list[int], left: int) -> Recorded | str:
        key = self._key, tokens
        recorded: Recorded | None = slot.graphs.get(key)
        if recorded is not None:
            slot.set_lengths(lengths)
            return recorded
        slot.seen[key] += 1
        if slot.seen[key] + max(0, left) // tokens < PAYS_BACK:
            return "too few steps to pay for a capture"
        start = time.perf_counter()
        try:
            slot.set_lengths(lengths)
            recorded = slot.graphs[key] = self._captured(model, slot, tokens)
        except Exception as error:  # whatever kernels, compilers and drivers raise; without the capture all goes on
            slot.on_device = None
            self.obstacle = f"a step could not be captured ({described(error)})"
            return self.obstacle
        self.statistics.captured(time.perf_counter() - start)
        return recorded

    def _captured(self, model: Any, slot: Slot, tokens: int) -> Recorded:
        try:
            return record(model, slot, tokens, self.capture, self.make_step)
        except torch.OutOfMemoryError:
            self.slots.free_others(slot)
        return record(model, slot, tokens, self.capture, self.make_step)

    def _replayed(self, recorded: Recorded, inputs: dict[str, Any]) -> Any:
        step, cache = recorded.step, inputs[CACHE]
        ids, positions = inputs["input_ids"], inputs["position_ids"]
        tokens = ids.shape[1]
        if tokens == step.tokens:
            step.ids.copy_(ids)
            step.positions.copy_(positions)
        else:
            step.ids[:, :tokens].copy_(ids)
            step.ids[:, tokens:].copy_(ids[:, -1:])
            torch.add(positions[:, -1:], step.ahead - (tokens - 1), out=step.positions)
        results = recorded.replay()
        layers = self._layers_of(cache)
        self._count(recorded, layers, tokens)
        self._latest = (recorded, layers) if step.tokens == 1 and layers[0].rows is None else None
        step.follows = cache.layers if self.layers is None else None
        given: dict[str, Any] = {CACHE: cache}
        return StepOutputs(logits=results.logits[:, :tokens], choices=results.choices[:, :tokens], **given)
