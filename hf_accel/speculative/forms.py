"""Cheaper forms of a model that share its tensors: in few bits, without some layers, or only sped up.

A copy has modules of its own and no tensor of its own but what it replaces; it is no part of the model, so saving,
training and copying the model do not see it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_accel.core.config import Config
from hf_accel.core.model.layer_list import layer_list
from hf_accel.core.model.shadow import has_users_hooks, shadow, twin
from hf_accel.core.steps.applying import apply
from hf_accel.core.steps.patcher import Patcher, Stage
from hf_accel.core.steps.plan import Plan
from hf_accel.core.steps.setting import Setting


@dataclass
class DraftForm:
    """A model that drafts: over the layers `layers` of the cache of the model it drafts for, or over its own cache."""

    name: str
    model: Any
    summary: str
    extra_bytes: int = 0
    layers: list[int] | None = None
    skipped: list[int] = field(default_factory=list)
    has_own_cache: bool = False


def to_try(setting: Setting, applied: list[Config]) -> Any:
    """Return a copy of the model to try steps on, sped up as it is: without hooks of the user's, and not in use."""
    model = twin(setting.model)
    if model is not setting.model:
        _apply(model, _speedups(applied), setting)
    return model


def few_bits(setting: Setting, bits: int, group_size: int | None, applied: list[Config]) -> DraftForm:
    """Return the model with its weights in few bits, sped up by the steps that speed up the model itself.

    Raises:
        HfAccelError: the weights cannot be stored in few bits.
    """
    model = shadow(setting.model)
    _apply(model, [few_bits_config(bits, group_size), *_speedups(applied)], setting)
    own = _own_bytes(model, setting.model)
    return DraftForm("self", model, f"its own weights in {bits} bits draft, {own / 1e6:.1f} MB more", own)


def few_bits_config(bits: int, group_size: int | None) -> Config:
    """Return the config of the weights that a model drafts with; the head needs no more bits than the rest."""
    values = {"type": "WeightOnlyConfig", "bits": bits, "group_size": group_size, "head": bits}
    return Config.from_dict(values)


def sped_up(draft_model: Any, applied: list[Config]) -> DraftForm:
    """Return the draft model of the user's, sped up in a copy of its modules; the user's own is left as it is."""
    model = shadow(draft_model)
    setting = Setting.of(model)
    fitting = [config for config in _speedups(applied) if not Patcher.for_config(config).obstacles(setting)]
    _apply(model, fitting, setting)
    return DraftForm("model", model, f"{type(draft_model).__name__} drafts", has_own_cache=True)


def without_layers(model: Any, skipped: list[int]) -> DraftForm:
    """Return the model without the layers `skipped`; others are the model's own modules, hooked ones copies of them."""
    name, layers = layer_list(model)
    kept = [index for index in range(len(layers)) if index not in skipped]
    form = shadow(model, layers)
    owner = form.get_submodule(name.rpartition(".")[0])
    setattr(owner, name.rpartition(".")[2], nn.ModuleList([_unhooked(layers[index]) for index in kept]))
    config = owner.config
    values = vars(config)
    values["num_hidden_layers"] = len(kept)
    if isinstance(values.get("layer_types"), (list, tuple)):
        values["layer_types"] = [config.layer_types[index] for index in kept]
    summary = f"the model without {len(skipped)} of its {len(layers)} layers drafts"
    return DraftForm("layer_skip", form, summary, layers=kept, skipped=skipped)


def _unhooked(layer: nn.Module) -> Any:
    return shadow(layer) if has_users_hooks(layer) else layer


def hosted(form: Any, original: Setting) -> Any:
    """Give a copy of a model, to which nothing is applied, a host at whose doors somebody may stand."""
    _apply(form, [], original)
    return form


def _speedups(applied: list[Config]) -> list[Config]:
    stages = (Stage.PRODUCTS, Stage.ATTENTION)
    return [config for config in applied if Patcher.for_config(config).stage in stages]


def _apply(model: Any, configs: list[Config], original: Setting) -> None:
    # what it replaces belongs to the original and stays there
    apply(Plan.of(configs), original.over(model, originals="drop"))


def _own_bytes(model: nn.Module, original: nn.Module) -> int:
    shared = {id(tensor) for tensor in itertools.chain(original.parameters(), original.buffers())}
    own: dict[int, torch.Tensor] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if id(tensor) not in shared:
            own[id(tensor)] = tensor
    return sum(tensor.numel() * tensor.element_size() for tensor in own.values())
