"""The step that gives a model attention of ours: a ladder of kernels for prompts, grouped heads as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from hf_accel.attention.cases import Case
from hf_accel.attention.demands import Demand, demands_of
from hf_accel.attention.grouped import MAX_QUERIES
from hf_accel.attention.kernels import KERNELS
from hf_accel.attention.ladder import AUTO, Ladder
from hf_accel.attention.names import NAMES, name_in
from hf_accel.attention.padded_prompts import PaddedPrompts
from hf_accel.attention.stock import eager_trial, is_untouched, sdpa_trial
from hf_accel.attention.trials import STOCK
from hf_accel.core.calls.doors import Door
from hf_accel.core.calls.hosting import Host
from hf_accel.core.calls.report import SECTIONS, Skip
from hf_accel.core.config import Config
from hf_accel.core.model.hf_config import own_configs
from hf_accel.core.steps.goal import Gain, Goal, Offer
from hf_accel.core.steps.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import ConfigError, MissingDependencyError, VerificationError

SECTION = "attention_calls"
DEMANDS = "what is asked of attention"
LONGEST = 4096  # tokens, where a model does not say how long its texts are


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(Config):
    """Attention of prompts by the kernel that suits a call, and of few queries on grouped keys and values as they are.

    backend: "auto" tests the kernels that are here against float64, times those that pass on the model's shapes, and
        calls the fastest, stock's where none is faster; or the name of one: "flash4", "flash3", "flash2", "cudnn",
        "flex", "sdpa", "native", "tiled". What it cannot do in a call goes on to those after it in this order.
    """

    backend: str = AUTO

    def __post_init__(self) -> None:
        if self.backend not in (AUTO, *KERNELS):
            known = ", ".join((AUTO, *KERNELS))
            raise ConfigError(f"AttentionConfig.backend is one of {known}; {self.backend!r} was given.")


class AttentionPatcher(Patcher[AttentionConfig], config=AttentionConfig):
    stage = Stage.ATTENTION
    fidelity = Fidelity.EXACT
    occupies = "attention back end"
    gain = Gain.OWN_ACCOUNT

    @classmethod
    def candidates(cls, goal: Goal, setting: Setting) -> Offer:
        if goal.is_only_told or _unreplaceable(setting):
            return Offer([AttentionConfig()])  # its obstacles are told
        ladder = Ladder(AUTO)
        demands = _prepare(ladder, setting)
        if isinstance(demands, str) or ladder.pays:
            return Offer([AttentionConfig()])
        return Offer([], [Skip(AttentionConfig.__name__, "no attention kernel here is faster than stock's")])

    def obstacles(self, setting: Setting) -> list[str]:
        model, asked = setting.anatomy.model, self.config.backend
        found = _unreplaceable(setting)
        if asked == AUTO or found:
            return found
        kernel = KERNELS[asked]
        if missing := kernel.missing():
            advice = f"Install hf-accel[{kernel.extra}]" if kernel.extra else "Choose another one"
            raise MissingDependencyError(f'backend="{asked}" of AttentionConfig: {missing}. {advice}, or use "auto".')
        demands = _demands(model, setting)
        if isinstance(demands, str):
            return [demands]
        reasons = dict.fromkeys(reason for demand in demands if (reason := kernel.obstacle(demand.question)))
        return [f'backend="{asked}" does not serve this model: {reason}. Use "auto".' for reason in reasons]

    def patch(self, setting: Setting, host: Host) -> Change:
        model, asked = setting.model, self.config.backend
        ladder = Ladder(asked)
        stands_for = _stands_for(model)
        demands = _prepare(ladder, setting)
        # few queries are served all the same
        skipped = (f"prompts run as they are: {demands}",) if isinstance(demands, str) else ()
        if refused := ladder.statistics.refused.get(asked):
            raise VerificationError(f'backend="{asked}" is not right here: {refused}. Use "auto".')
        name: Any = NAMES[stands_for].with_ladder(None if skipped else ladder)
        configs = own_configs(model, host.journal)

        def select(chosen: str) -> None:
            for config in configs:
                if config._attn_implementation == NAMES[stands_for]:  # stock's, too; what the user chose since stays
                    config._attn_implementation = chosen

        select(name)
        host.journal.did(partial(select, stands_for))  # models that were made from one of these configs share it
        # the manager of continuous batching keeps reading the name after it is made, so the model stays with stock's
        host.stand(Door.CONTINUOUS_BATCHING, partial(select, stands_for))
        host.stand(Door.PADDED_PROMPT, PaddedPrompts(ladder.statistics))
        host.report.sections[SECTION] = ladder.statistics
        host.journal.did(lambda: host.report.sections.__delitem__(SECTION))
        return Change(_summary(ladder), skipped=skipped)


def _unreplaceable(setting: Setting) -> list[str]:
    """Return why attention of ours cannot stand in for the model's."""
    model = setting.anatomy.model
    now = model.config._attn_implementation
    if now == "eager" and model._supports_sdpa:
        return ["the model's attention is 'eager', which was chosen for it; 'sdpa' is replaced."]
    if now not in NAMES:
        return [f"the model's attention is {now!r}; only 'sdpa' and 'eager' are replaced."]
    if not model._can_set_attn_implementation():
        return [f"{setting.anatomy.architecture} does not take its attention from transformers' registry."]
    if now == "eager" and isinstance(found := _demands(model, setting), str):
        return [found]
    return []


def _prepare(ladder: Ladder, setting: Setting) -> list[Demand] | str:
    """Test and time the kernels of a ladder for the model; return what it demands, or why its prompts stay stock's."""
    model = setting.anatomy.model
    demands = _demands(model, setting)
    if not isinstance(demands, str):
        config = model.config.get_text_config(decoder=True)
        longest = getattr(config, "max_position_embeddings", None) or LONGEST
        ladder.prepare(demands, partial(_stock, _stands_for(model)), longest)
        if _stands_for(model) == "sdpa" and is_untouched():
            ladder.expect_plans(demands)
    return demands


def _stands_for(model: Any) -> str:
    """Return the stock attention that the model has, or that its own stands for."""
    name = name_in(model.config)
    return str(model.config._attn_implementation) if name is None else name.stands_for


def _demands(model: Any, setting: Setting) -> list[Demand] | str:
    """Return what the model asks of attention; found out once for weights that are tried again and again."""
    kept = setting.prepared_for(model)
    key = (DEMANDS, model.dtype, model.device)
    if key not in kept:
        kept[key] = demands_of(model, NAMES[_stands_for(model)].with_ladder)
    found: list[Demand] | str = kept[key]
    return found


def _stock(stands_for: str, demand: Demand) -> Callable[[Case], object]:
    """Return stock's attention as trials call it."""
    ratio = demand.question.heads // demand.question.groups
    return eager_trial(demand.module) if stands_for == "eager" else sdpa_trial(ratio)


def _summary(ladder: Ladder) -> str:
    """Return what serves prompts and few queries, in words."""
    few = f"up to {MAX_QUERIES} queries read grouped keys and values without expanding them"
    if ladder.first_use is not None:
        few += "; prompts of a length that is new to a thread by FlashAttention, until a plan of cuDNN's pays"
    if ladder.asked != AUTO:
        return f"attention of prompts by {ladder.asked}; {few}"
    names = dict.fromkeys(each.kernel for each in ladder.statistics.chosen if each.kernel != STOCK)
    return f"attention of prompts by {', '.join(names) or 'stock, which nothing here is faster than'}; {few}"


SECTIONS[SECTION] = "attention"
