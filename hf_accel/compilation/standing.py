"""Who stands at the doors of a model whose steps are captured, and at those of the models that draft for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_accel.compilation.blocks import CompiledSteps
from hf_accel.compilation.caches import StaticCaches
from hf_accel.compilation.capture import Capture
from hf_accel.compilation.guard import ModelGuard
from hf_accel.compilation.runner import StaticRunner
from hf_accel.compilation.slots import Slots
from hf_accel.compilation.statistics import CompilationStatistics
from hf_accel.compilation.trial import step_obstacle
from hf_accel.core.calls.call import NewCache
from hf_accel.core.calls.doors import CacheMaker, Door
from hf_accel.core.calls.drafting import DraftModel, Speculation
from hf_accel.core.calls.hosting import Host, host_of
from hf_accel.core.model.modes import evaluating


class Standing:
    """Runners and makers of caches that share slots, memory of captures, and counts."""

    def __init__(self, model: Any, host: Host, capture: Capture, make_step: Any) -> None:
        self.host, self.capture, self.make_step = host, capture, make_step
        self.slots = Slots(model.device)
        self.statistics = CompilationStatistics(lambda: self.slots.bytes)
        self._stand(model, host, host.doors.get(Door.NEW_CACHE), 0)
        host.journal.did(self.slots.forget_captures)

    def _stand(self, model: Any, host: Host, before: CacheMaker | None, number: int) -> None:
        guard = ModelGuard(model, self.slots)
        if isinstance(self.make_step, CompiledSteps):
            guard.on_change.append(self.make_step.forget)
        caches = StaticCaches(self.slots, guard, self.statistics, before, number)
        host.stand(Door.NEW_CACHE, caches)
        self._run(model, host, None).caches = None if number else caches

    def _run(self, model: Any, host: Host, layers: list[int] | None) -> StaticRunner:
        runner = StaticRunner(model, self.slots, self.capture, self.statistics, layers, self.make_step)
        host.stand(Door.FORWARD, runner)
        return runner

    def over_drafts(self) -> tuple[str, ...]:
        """Let the models that draft replay their steps, too; return why some of them do not."""
        speculation: Speculation | None = self.host.doors.get(Door.DRAFTS)
        reasons = []
        for number, draft in enumerate([] if speculation is None else speculation.models(), start=1):
            if reason := self._over_draft(draft, number):
                reasons.append(f"steps of a {type(draft.model).__name__} that drafts: {reason}")
        return tuple(reasons)

    def _over_draft(self, draft: DraftModel, number: int) -> str | None:
        host: Any = host_of(draft.model)
        if draft.layers is not None:  # layers of the model itself, at their places in its cache
            if isinstance(self.make_step, CompiledSteps):
                return "layers are left out of it"
            self._run(draft.model, host, draft.layers)
            return None
        with evaluating(draft.model):
            if reason := step_obstacle(draft.model, self.capture, self.make_step):
                return reason
        if draft.has_own_cache:
            prepare: Callable[[Any, int], None] | None = self.host.doors.get(Door.DRAFT_CACHE)
            self._stand(draft.model, host, None if prepare is None else DraftCaches(prepare), number)
        else:
            self._run(draft.model, host, None)
        return None


class DraftCaches:
    """Makes the caches of draft models as they are made where nothing is captured."""

    def __init__(self, prepare: Callable[[Any, int], None]) -> None:
        self.prepare = prepare

    def fill(self, new: NewCache) -> None:
        """See `hf_accel.core.calls.doors.CacheMaker`."""
        self.prepare(new.cache, new.expected_tokens)

    def bits(self, new: NewCache) -> tuple[int | None, str | None]:
        """See `hf_accel.core.calls.doors.CacheMaker`."""
        return None, None
