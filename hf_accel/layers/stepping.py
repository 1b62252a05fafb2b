"""Stands where passes after the prompt are run: a token of one sequence through the whole model in one native call.

Where the model is what it was, nothing is hooked or asked for and the row is not padded, a step is one call in C and
some twenty microseconds of looking; everything else runs the model. See `hf_accel.core.calls.doors.Door.FORWARD`.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch

from hf_accel.core.calls.call import Request, request_in_progress
from hf_accel.core.calls.forward import StepOutputs, understood_inputs
from hf_accel.core.drift import CACHE
from hf_accel.kernels import native
from hf_accel.layers.step_guard import StepGuard


class _State:
    """A sequence of steps over one cache in one call."""

    def __init__(self, request: Request | None, cache: Any, step: native.NativeStep) -> None:
        self.request, self.cache, self.step, self.position = request, cache, step, 0
        self.memory = native.StepMemory(len(step.blocks), step.hidden)
        self.logits: Any = None
        self.length = 0


class StepRunner:
    """Runs the steps of one model."""

    def __init__(self, model: Any, guard: StepGuard) -> None:
        self._model = weakref.ref(model)  # the model refers to what stands at its doors
        self.guard, self._understood = guard, understood_inputs(model)
        self._local = threading.local()
        self._parts = [(s.block.index, s.block.kv_heads, s.block.head_dim) for s in guard.steps]
        self._device = torch.device("cpu")
        self.served = 0  # how many steps were native calls

    def __call__(self, **inputs: Any) -> Any:
        """Return the outputs of the model for these inputs."""
        model: Any = self._model()
        found = self._served(inputs)
        return model(**inputs) if found is None else found

    def follow(self, cache: Any) -> torch.Tensor | None:
        """Run the step that takes in what the latest one chose, and return what it chooses, int64 [1, 1].

        None where something came between, or the step cannot be run here.
        """
        state: _State | None = getattr(self._local, "state", None)
        if (
            state is None
            or state.cache is not cache
            or state.request is not request_in_progress()
            or not self.guard.is_in_place()
            or cache.layers[self._parts[0][0]].get_seq_length() != state.length
        ):
            return None
        return state.memory.choice.clone() if self._run(state) else None

    def _served(self, inputs: dict[str, Any]) -> StepOutputs | None:
        ids, cache, request = inputs.get("input_ids"), inputs.get(CACHE), request_in_progress()
        self._local.state, last = None, getattr(self._local, "state", None)
        if (
            ids is None
            or ids.shape != (1, 1)
            or cache is None
            or request is None
            or getattr(cache, "offloading", True)
            or any(name not in self._understood and value is not None for name, value in inputs.items())
            or inputs.get("use_cache") is not True
            or self._parts[-1][0] >= len(cache.layers)
        ):
            return None
        step = self.guard.step_for(request)
        if step is None:
            return None
        length = cache.layers[self._parts[0][0]].get_seq_length()
        positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
        if positions is not None and positions.shape != (1, 1):
            return None
        if mask is not None and (
            type(mask) is not torch.Tensor or mask.shape != (1, length + 1) or not bool(mask.all())
        ):
            return None
        state = last
        if state is None or state.cache is not cache or state.step is not step or state.request is not request:
            state = _State(request, cache, step)
        state.position, state.length = length if positions is None else int(positions), length
        state.memory.choice.copy_(ids)
        if not self._run(state):
            return None
        self._local.state = state
        given: dict[str, Any] = {CACHE: cache}
        return StepOutputs(logits=state.logits, choices=state.memory.choice.clone(), **given)

    def _run(self, state: _State) -> bool:
        """Run one step, if the cache can take it; leave all as it was if not."""
        step = state.step
        if state.position >= step.positions:
            longer = self.guard.longer(state.position)
            if longer is None:
                return False
            state.step = step = longer
        place, layers, dtype, device = state.memory.place, state.cache.layers, step.dtype, self._device
        for number, (index, kv_heads, head_dim) in enumerate(self._parts):
            layer = layers[index]
            reserve = getattr(layer, "reserve", None)
            reserved = None if reserve is None else reserve(1, 1, kv_heads, head_dim, dtype, device)
            if reserved is None or reserved[4] is not None:
                return False
            keys, values, past, first, _ = reserved
            place(number, keys, values, past, first, layer.bits)
        logits = step(state.memory, state.position)
        if logits is None:
            return False
        for index, _, _ in self._parts:
            layers[index].commit(1)
        state.logits, state.position, state.length = logits, state.position + 1, state.length + 1
        self.served += 1
        return True
