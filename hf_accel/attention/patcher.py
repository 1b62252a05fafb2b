"""The step that gives a model an attention back end of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from hf_accel.attention.grouped import MAX_QUERIES, NAME
from hf_accel.core.calls.doors import Door
from hf_accel.core.calls.hosting import Host
from hf_accel.core.config import Config
from hf_accel.core.model.hf_config import own_configs
from hf_accel.core.steps.goal import Gain
from hf_accel.core.steps.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.core.steps.setting import Setting


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(Config):
    """Attention for few queries that reads grouped keys and values as they are."""


class AttentionPatcher(Patcher[AttentionConfig], config=AttentionConfig):
    stage = Stage.ATTENTION
    fidelity = Fidelity.EXACT
    occupies = "attention back end"
    gain = Gain.SEVERAL_TOKENS

    def beside(self, claimed: Mapping[str, str]) -> str | None:
        return "decoder layers run natively, their attention included" if "decoder layers" in claimed else None

    def obstacles(self, setting: Setting) -> list[str]:
        anatomy = setting.anatomy
        config = anatomy.model.config
        if config._attn_implementation != "sdpa":
            return [f"the model's attention is {config._attn_implementation!r}; only 'sdpa' is replaced."]
        if not anatomy.model._can_set_attn_implementation():
            return [f"{anatomy.architecture} does not take its attention from transformers' registry."]
        return []

    def patch(self, setting: Setting, host: Host) -> Change:
        configs = own_configs(setting.model, host.journal)

        def select(name: str) -> None:
            for config in configs:
                if config._attn_implementation == NAME:  # "sdpa", too; what the user chose since stays
                    config._attn_implementation = name

        select(NAME)
        host.journal.did(partial(select, "sdpa"))  # models that were made from one of these configs share it
        # the manager of continuous batching keeps reading the name after it is made, so the model stays with sdpa
        host.stand(Door.CONTINUOUS_BATCHING, partial(select, "sdpa"))
        return Change(f"attention of up to {MAX_QUERIES} queries reads grouped keys and values without expanding them")
