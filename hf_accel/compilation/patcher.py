"""Applies a compilation config to a model."""

from __future__ import annotations

from typing import Any

from hf_accel.compilation.caches import StaticCaches
from hf_accel.compilation.capture import CAPTURES, graph_obstacle
from hf_accel.compilation.config import CompilationConfig
from hf_accel.compilation.guard import ModelGuard
from hf_accel.compilation.runner import StaticRunner
from hf_accel.compilation.slots import BUCKETS, Slots
from hf_accel.compilation.statistics import CompilationStatistics
from hf_accel.compilation.step import StaticStep
from hf_accel.compilation.trial import step_obstacle
from hf_accel.core.calls.doors import Door
from hf_accel.core.calls.hosting import Host
from hf_accel.core.calls.report import SECTIONS, Skip
from hf_accel.core.model.shadow import twin
from hf_accel.core.model.undisturbed import undisturbed
from hf_accel.core.steps.goal import Goal, Offer
from hf_accel.core.steps.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import UnsupportedModelError

SECTION = "compilation"


class CompilationPatcher(Patcher[CompilationConfig], config=CompilationConfig):
    stage = Stage.COMPILATION
    fidelity = Fidelity.EXACT
    occupies = "compiled steps"

    def __init__(self, config: CompilationConfig) -> None:
        super().__init__(config)
        # steps are the token loop's, and only attention of ours reads buffers as far as they are filled
        self.needs = () if config.mode == "off" else ("DecodingConfig", "AttentionConfig")

    @classmethod
    def candidates(cls, goal: Goal, setting: Setting) -> Offer:
        device = setting.model.device
        if reason := graph_obstacle(device):
            return Offer(skipped=[Skip("CompilationConfig", reason)] if device.type == "cuda" else [])
        return Offer([CompilationConfig()])

    def obstacles(self, setting: Setting) -> list[str]:
        model = setting.model
        if self.config.mode == "off":
            return []
        if reason := graph_obstacle(model.device):
            return [reason]
        if not model._supports_default_dynamic_cache():
            return [f"{setting.anatomy.architecture} does not use transformers' DynamicCache."]
        return []

    def patch(self, setting: Setting, host: Host) -> Change:
        if self.config.mode == "off":
            return Change("steps run as they are")
        model = setting.model
        slots = Slots(model.device)
        statistics = CompilationStatistics(lambda: slots.bytes)
        capture = CAPTURES[model.device.type](model.device)
        tried: Any = twin(model)
        with undisturbed(tried), tried._optimize_model_for_decode():
            if reason := step_obstacle(tried, capture, StaticStep):
                raise UnsupportedModelError(
                    f"Steps of this {type(model).__name__} cannot be captured: {reason}. Leave CompilationConfig out."
                )
        runner = StaticRunner(model, slots, capture, statistics)
        guard = ModelGuard(model, slots)
        host.stand(Door.NEW_CACHE, StaticCaches(slots, guard, statistics, host.doors.get(Door.NEW_CACHE)))
        host.stand(Door.FORWARD, runner)
        host.report.sections[SECTION] = statistics
        host.journal.did(slots.forget_captures)
        buckets = ", ".join(f"{bucket:,}" for bucket in BUCKETS)
        return Change(f"steps are captured as graphs over buffers of {buckets} and further columns, and replayed")


SECTIONS[SECTION] = "compiled steps"
