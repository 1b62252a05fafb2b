"""Stands where passes after the prompt are run: a token of each sequence through the whole model in one native call.

Where the model is what it was, nothing is hooked or asked for and no row is padded, a step is one call in C and some
twenty microseconds of looking; everything else runs the model. Rows lie in one buffer, or each in its own (see
`hf_accel.core.calls.cache_layers.Reserved.rows`). See `hf_accel.core.calls.doors.Door.FORWARD`.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from hf_accel.core.calls.call import request_in_progress
from hf_accel.core.calls.forward import StepOutputs, understood_inputs
from hf_accel.core.drift import CACHE
from hf_accel.kernels import native
from hf_accel.layers.step_guard import StepGuard


class _State:
    """Steps that follow on one another, of `rows` sequences over one cache in one call."""

    def __init__(self, cache: Any, step: native.NativeStep, rows: int) -> None:
        self.cache, self.step, self.rows = cache, step, rows
        self.memory = native.StepMemory(len(step.blocks), step.hidden, rows)
        self.positions: list[int] = []
        self.logits: Any = None
        self.length = 0
        self.is_apart = False  # rows lie in buffers of their own


class StepRunner:
    """Runs the steps of one model."""

    def __init__(self, model: Any, guard: StepGuard) -> None:
        self._model = weakref.ref(model)  # the model refers to what stands at its doors
        self.guard, self._understood = guard, understood_inputs(model)
        self._parts = [(s.block.index, s.block.kv_heads, s.block.head_dim) for s in guard.steps]
        self._device = torch.device("cpu")
        self.served = 0  # how many steps were native calls

    def __call__(self, **inputs: Any) -> Any:
        """Return the outputs of the model for these inputs."""
        model: Any = self._model()
        found = self._served(inputs)
        return model(**inputs) if found is None else found

    def follow(self, cache: Any) -> torch.Tensor | None:
        """Run the step that takes in what the latest one chose, and return what it chooses, int64 [B, 1].

        None where something came between, or the step cannot be run here.
        """
        request = request_in_progress()
        state: _State | None = None if request is None else request.latest.get(self)
        if (
            state is None
            or state.is_apart
            or state.cache is not cache
            or not self.guard.is_in_place()
            or cache.layers[self._parts[0][0]].get_seq_length() != state.length
        ):
            return None
        return state.memory.choice.clone() if self._run(state, True) else None

    def _served(self, inputs: dict[str, Any]) -> StepOutputs | None:
        ids, cache, request = inputs.get("input_ids"), inputs.get(CACHE), request_in_progress()
        if request is None:
            return None
        last = request.latest.pop(self, None)
        if (
            ids is None
            or len(ids.shape) != 2
            or ids.shape[1] != 1
            or cache is None
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
        rows = len(ids)
        if positions is not None and positions.shape != (rows, 1):
            return None
        sees_all = mask is None or (
            type(mask) is torch.Tensor and mask.shape == (rows, length + 1) and bool(mask.all())
        )
        if not sees_all and not self._lie_apart(cache, rows, step.dtype):
            return None
        state = last
        if state is None or state.cache is not cache or state.step is not step or state.rows != rows:
            state = _State(cache, step, rows)
        state.positions = [length] * rows if positions is None else positions.flatten().tolist()
        state.length = length
        state.memory.choice.copy_(ids)
        if not self._run(state, sees_all):
            return None
        request.latest[self] = state
        given: dict[str, Any] = {CACHE: cache}
        return StepOutputs(logits=state.logits, choices=state.memory.choice.clone(), **given)

    def _lie_apart(self, cache: Any, rows: int, dtype: torch.dtype) -> bool:
        """Return whether the rows lie in buffers of their own."""
        index, kv_heads, head_dim = self._parts[0]
        reserve = getattr(cache.layers[index], "reserve", None)
        reserved = None if reserve is None else reserve(rows, 1, kv_heads, head_dim, dtype, self._device)
        return reserved is not None and reserved.rows is not None

    def _run(self, state: _State, sees_all: bool) -> bool:
        """Run one step, if the cache can take it; leave all as it was if not.

        sees_all: the mask, if there is one, hides nothing. Rows in buffers of their own see what is theirs anyway.
        """
        step, rows = state.step, state.rows
        if (last := max(state.positions)) >= step.positions:
            longer = self.guard.longer(last)
            if longer is None:
                return False
            state.step = step = longer
        is_apart = False
        place, layers, dtype, device = state.memory.place, state.cache.layers, step.dtype, self._device
        for number, (index, kv_heads, head_dim) in enumerate(self._parts):
            layer = layers[index]
            reserve = getattr(layer, "reserve", None)
            reserved = None if reserve is None else reserve(rows, 1, kv_heads, head_dim, dtype, device)
            if reserved is None:
                return False
            keys, values, past, first, row_pasts, apart = reserved
            if row_pasts is not None or not (sees_all or apart is not None):
                return False
            if rows > 1 and not self.guard.steps[number].extent.covers(rows, past + 1 - first):
                return False
            place(number, keys, values, past, first, layer.bits, apart)
            is_apart = is_apart or apart is not None
        state.is_apart = is_apart
        logits = step(state.memory, *state.positions)
        if logits is None:
            return False
        for index, _, _ in self._parts:
            layers[index].commit(1)
        state.logits, state.length = logits, state.length + 1
        state.positions = [position + 1 for position in state.positions]
        self.served += 1
        return True
