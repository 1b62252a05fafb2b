"""The step that has the routed experts of each layer computed in one native call."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_accel.core.calls.hosting import Host
from hf_accel.core.calls.report import SECTIONS
from hf_accel.core.config import Config
from hf_accel.core.journal import subclass
from hf_accel.core.model.anatomy import holds_experts
from hf_accel.core.model.experts import RoutedExperts, active_experts
from hf_accel.core.model.hf_config import own_configs
from hf_accel.core.steps.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import VerificationError
from hf_accel.experts.implementation import KEY, STEPS, ImplementationName, stock_forward
from hf_accel.experts.router import NativeRouter, RouterStep, router_forward
from hf_accel.experts.statistics import ExpertsStatistics
from hf_accel.experts.step import ExpertsStep
from hf_accel.kernels import native
from hf_accel.ops import tolerances

SECTION = "expert_routing"
_STOCK = ("grouped_mm", "batched_mm", "eager")  # what transformers chooses by itself; the user's own choice stays
_TOKENS = 4  # of the audit


@dataclass(frozen=True, kw_only=True)
class NativeExpertsConfig(Config):
    """The routed experts of each layer in one native call, on the weights as they lie in memory."""


class NativeExpertsPatcher(Patcher[NativeExpertsConfig], config=NativeExpertsConfig):
    stage = Stage.PRODUCTS
    fidelity = Fidelity.EXACT
    occupies = "experts"
    is_preferred = True

    def obstacles(self, setting: Setting) -> list[str]:
        anatomy = setting.anatomy
        found = native.obstacles(anatomy.device)
        if not any(isinstance(module, RoutedExperts) or _is_dense(module) for module in anatomy.model.modules()):
            found.append("the model has no stacked experts that transformers' registry of implementations serves.")
        names = {m.config._experts_implementation for m in anatomy.model.modules() if _is_dense(m)}
        if foreign := sorted(str(name) for name in names if str(name) not in _STOCK):
            found.append(f"the model's experts run by {', '.join(foreign)}, which was chosen for it.")
        return found

    def patch(self, setting: Setting, host: Host) -> Change:
        model = setting.anatomy.model
        counts: dict[str, torch.Tensor] = {}
        sizes: dict[str, int] = {}
        skipped: list[str] = []
        steps: dict[Any, ExpertsStep] = {}
        for path, module in model.named_modules():
            if isinstance(module, RoutedExperts):  # packed ones, which make a native call of their own
                counts[path], sizes[path] = module.counts, module.expert_bytes
            elif holds_experts(module):
                try:
                    if not _is_dense(module):
                        raise ValueError("they are not in transformers' registry of expert implementations")
                    step = ExpertsStep(module)
                except ValueError as error:
                    skipped.append(f"the experts {path} stay with transformers' code: {error}")
                    continue
                _audit(path, module, step)
                steps[module] = step
                counts[path], sizes[path] = step.counts, step.expert_bytes
        self._register(model, steps, host)
        routers = _swap_routers(model, counts, host)
        host.report.sections[SECTION] = ExpertsStatistics(counts, sizes, active_experts(model))
        host.journal.did(lambda: host.report.sections.__delitem__(SECTION))
        number = sum(step.form.experts for step in steps.values())
        packed = f", {len(counts) - len(steps)} packed ones do by themselves" if len(counts) > len(steps) else ""
        summary = f"{number} experts of {len(steps)} layers run in one native call a layer{packed}"
        summary += f"; {routers} routers run natively" if routers else ""
        return Change(summary, skipped=tuple(skipped))

    def _register(self, model: Any, steps: dict[Any, ExpertsStep], host: Host) -> None:
        if not steps:
            return
        own_configs(model, host.journal)  # models that were made from one of these share it
        for config in {id(module.config): module.config for module in steps}.values():
            before = config._experts_implementation
            config._experts_implementation_internal = ImplementationName(before)
            host.journal.did(partial(_put_back, config, before))
        for module, step in steps.items():
            STEPS[module] = step
            host.journal.did(partial(STEPS.__delitem__, module))


def _swap_routers(model: Any, paths: Iterable[str], host: Host) -> int:
    """Let the routers that stand beside the experts at `paths` run natively for few tokens; return how many do."""
    count = 0
    for parent in {path.rpartition(".")[0]: None for path in paths}:
        for module in model.get_submodule(parent).children():
            try:
                step = RouterStep(module)
            except ValueError:  # another part of the layer, or a router of a kind that is not known
                continue
            made = subclass(NativeRouter, type(module), step=step, forward=router_forward(step))
            host.journal.swap_class(module, made)
            count += 1
    return count


def _put_back(config: Any, before: str) -> None:
    if config._experts_implementation == KEY:  # what the user chose since stays
        config._experts_implementation_internal = before


def _is_dense(module: nn.Module) -> bool:
    """Return whether `module` asks transformers' registry how its experts are computed."""
    return holds_experts(module) and hasattr(module, "has_gate") and hasattr(module, "config")


@torch.no_grad()
def _audit(path: str, module: Any, step: ExpertsStep) -> None:
    """Raise VerificationError if a few tokens come out otherwise than by the module's own code."""
    form, generator = step.form, torch.Generator().manual_seed(0)
    hidden = torch.randn(_TOKENS, form.hidden, generator=generator).to(step.dtype)
    ids = torch.randint(form.experts, (_TOKENS, 2), generator=generator)
    weights = torch.rand(_TOKENS, 2, generator=generator).to(step.dtype)
    found, expected = step.output(module, hidden, ids, weights), stock_forward(module, hidden, ids, weights)
    bound = tolerances.of_layer_output(step.dtype, False)
    if found is None:
        return  # it is hooked; looked at again at every call
    difference = float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
    if not difference <= bound:
        raise VerificationError(
            f"The experts {path} ({type(module).__name__}) differ from their own code by {difference:.1e} when run "
            f"natively; rounding explains {bound:.0e}. They were not replaced. "
            "Leave NativeExpertsConfig out for this model."
        )


SECTIONS[SECTION] = "routing to experts"
