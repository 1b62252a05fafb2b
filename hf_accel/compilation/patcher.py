"""Applies a compilation config to a model."""

from __future__ import annotations

from hf_accel.compilation.artefacts import Artefacts, compiler_obstacle
from hf_accel.compilation.blocks import CompiledSteps
from hf_accel.compilation.capture import Direct, capture_for, graph_obstacle
from hf_accel.compilation.config import CompilationConfig
from hf_accel.compilation.payoff import step_seconds
from hf_accel.compilation.slots import BUCKETS
from hf_accel.compilation.standing import Standing
from hf_accel.compilation.step import StaticStep
from hf_accel.compilation.trial import step_obstacle
from hf_accel.core.calls.hosting import Host
from hf_accel.core.calls.report import SECTIONS
from hf_accel.core.model.modes import evaluating
from hf_accel.core.model.undisturbed import undisturbed
from hf_accel.core.model.watching import Watch
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

    def obstacles(self, setting: Setting) -> list[str]:
        model, mode = setting.model, self.config.mode
        if mode == "off":
            return []
        if reason := graph_obstacle(model.device) if mode == "graphs" else compiler_obstacle(model.device):
            return [reason]
        if Watch(model, list(model.modules())[1:]).is_hooked():
            return ["modules of the model have hooks, which a replay would not call; remove them first."]
        if not model._supports_default_dynamic_cache():
            return [f"{setting.anatomy.architecture} does not use transformers' DynamicCache."]
        return []

    def patch(self, setting: Setting, host: Host) -> Change:
        model, config = setting.model, self.config
        if config.mode == "off":
            return Change("steps run as they are")
        capture, make_step = capture_for(model.device), StaticStep if config.mode == "graphs" else CompiledSteps()
        kept = None if config.folder is None else Artefacts(config.folder, model)
        if kept is not None:
            kept.load()
        # plans are applied again and again while they are timed; what was found out depends on what was applied before
        found = setting.prepared_for(model)
        key = config, tuple(step.config for step in host.report.applied)
        if key not in found:
            # not on a copy: it would have neither the attention nor the layers that this one was given
            with evaluating(model), undisturbed(model), model._optimize_model_for_decode():
                reason = step_obstacle(model, capture, make_step)
                is_certain = reason is not None or not isinstance(capture, Direct)
                found[key] = reason, None if is_certain else step_seconds(model, make_step)
        reason, seconds = found[key]
        if reason is not None:
            raise UnsupportedModelError(
                f"Steps of this {type(model).__name__} cannot be captured: {reason}. Leave CompilationConfig out."
            )
        if kept is not None:
            kept.save()
        if seconds is not None and seconds[1] >= seconds[0]:
            took = f"{1e3 * seconds[1]:.2f} ms instead of {1e3 * seconds[0]:.2f} ms"
            return Change(f"steps run as they are: compiled, they take {took} here")
        standing = Standing(model, host, capture, make_step)
        host.report.sections[SECTION] = standing.statistics
        skipped = standing.over_drafts()
        what = "decoder layers are compiled, " if config.mode == "compile" else ""
        how = "run" if isinstance(capture, Direct) else "captured as graphs and replayed"
        gain = "" if seconds is None else f" ({1e3 * seconds[0]:.2f} ms -> {1e3 * seconds[1]:.2f} ms)"
        buckets = ", ".join(f"{bucket:,}" for bucket in BUCKETS)
        return Change(f"{what}steps are {how} over buffers of {buckets} and more columns{gain}", skipped=skipped)


SECTIONS[SECTION] = "compiled steps"
