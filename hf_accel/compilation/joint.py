"""Steps of one token for calls that have rows of shared buffers: one replay for all that take part.

Rows that take no part compute what a row beside them does, at lengths of their own, see `SharedSlot.lengths_beside`.
Results are copied: the calls go on with them while the next replay is made. Cost beside the replay: five launches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hf_accel.compilation.call_layers import CallLayer
from hf_accel.compilation.shared import FirstRows, SharedRows
from hf_accel.core.calls.call import request_in_progress
from hf_accel.core.calls.forward import StepOutputs
from hf_accel.core.drift import CACHE

Taking = tuple[SharedRows, list[CallLayer]]  # the rows of a call, and the layers of its cache


class Latest(NamedTuple):
    """A step of one call that had all rows of the buffers it was captured over."""

    recorded: Any
    first: FirstRows
    rows: SharedRows
    layers: list[CallLayer]


def taking_part(cache: Any) -> list[Taking]:
    """Return the calls that a cache is of, in the order of their rows; none where it is not all of shared buffers."""
    layers = getattr(cache, "layers", None)
    if not layers:
        return []
    caches = [layers]
    if hasattr(layers[0], "members"):  # a `JoinedLayer`
        caches = [list(each) for each in zip(*(layer.members for layer in layers), strict=True)]
    found = [(getattr(each[0], "slot", None), each) for each in caches]
    return found if all(isinstance(rows, SharedRows) for rows, _ in found) else []  # type: ignore[return-value]


class JointSteps:
    """Makes these steps.

    recorded: called with a slot, the lengths of its rows and how many steps are expected, returns the captured step, or
    why there is none. replayed: is told of every replay.
    """

    def __init__(self, recorded: Callable[[FirstRows, list[int], int], Any], replayed: Callable[[], None]) -> None:
        self._recorded, self._replayed = recorded, replayed
        self._latest: Latest | None = None

    def __call__(self, calls: list[Taking], inputs: dict[str, Any]) -> StepOutputs | str:
        """Return the outputs of one token of each row, in the order of the calls, or why they are not to be had."""
        self._latest = None
        ids, positions = inputs["input_ids"], inputs["position_ids"]
        shape = sum(rows.rows for rows, _ in calls), 1
        if tuple(ids.shape) != shape or tuple(positions.shape) != shape:
            return "the inputs are of another shape than one token of each row"
        live: dict[int, int] = {}
        for rows, layers in calls:
            if reason := _obstacle(rows, layers, calls[0][0]):
                return reason
            live |= dict.fromkeys(range(rows.first, rows.stop), layers[0].length)
        shared = calls[0][0].shared
        first = shared.first(max(live) + 1)
        left = max(rows.expected - layers[0].length for rows, layers in calls)
        recorded = self._recorded(first, shared.lengths_beside(live, first.rows), max(left, first.asked))
        if isinstance(recorded, str):
            return recorded
        sources, places = _orders(tuple(live), first)
        torch.index_select(ids, 0, sources, out=recorded.step.ids)
        torch.index_select(positions, 0, sources, out=recorded.step.positions)
        results = recorded.replay()
        self._advance(first, calls)
        if len(calls) == 1 and len(live) == first.rows:
            self._latest = Latest(recorded, first, *calls[0])
        given: dict[str, Any] = {CACHE: inputs[CACHE]}
        logits, choices = (result.index_select(0, places) for result in results)
        return StepOutputs(logits=logits, choices=choices, **given)

    def follow(self, cache: Any) -> torch.Tensor | None:
        """Run the step that takes in what the latest one chose. See `StaticRunner.follow`."""
        latest, self._latest = self._latest, None
        if latest is None or cache.layers is not latest.layers:
            return None
        recorded, first, rows, layers = latest
        if (
            rows.request() is not request_in_progress()
            or first.on_device != [layers[0].length] * first.rows
            or not any(recorded is other for other in first.graphs.values())
            or _obstacle(rows, layers, rows)
        ):
            return None
        choices = recorded.replay().choices.clone()
        self._advance(first, [(rows, layers)])
        self._latest = latest
        return choices  # type: ignore[no-any-return]

    def _advance(self, first: FirstRows, calls: list[Taking]) -> None:
        first.advanced(1)
        for _, layers in calls:
            for layer in layers:
                layer.length += 1
        self._replayed()

    def forget(self) -> None:
        """Keep nothing of the latest step."""
        self._latest = None


def _orders(live: tuple[int, ...], first: FirstRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which row of the inputs each row of a step takes in, and which of its rows each output is."""
    if first.orders is None or first.orders[0] != live:
        at = {row: place for place, row in enumerate(live)}
        sources = torch.tensor([at.get(row, 0) for row in range(first.rows)])
        orders = [order.to(first.device, non_blocking=True) for order in (sources, torch.tensor(live))]
        first.orders = live, orders[0], orders[1]
    return first.orders[1:]


def _obstacle(rows: SharedRows, layers: list[CallLayer], beside: SharedRows) -> str | None:
    """Return why a call cannot take part in a step with the rows `beside`, None if it can."""
    length = layers[0].length
    if any(layer.slot is not rows or layer.step_layer is None for layer in layers):
        return "the cache has no fixed buffers"
    if rows.shared is not beside.shared:
        return "the caches have rows of different buffers"
    if rows.request() is None:
        return "the cache is of another call"
    if any(layer.length != length or layer.rows is not None for layer in layers):
        return "layers of the cache have different lengths"
    return "the end of the buffers or of the context is near" if length >= rows.shared.capacity else None
