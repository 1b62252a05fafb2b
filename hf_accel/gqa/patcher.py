"""Puts fewer key and value heads in place of a model's own, so that they can be put back."""

from __future__ import annotations

from typing import Any

import torch

from hf_accel.core.calls.hosting import Host
from hf_accel.core.journal import Journal
from hf_accel.core.model.hf_config import own_configs
from hf_accel.core.model.shadow import twin
from hf_accel.core.steps.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import ConfigError, UnsupportedModelError
from hf_accel.gqa.config import GQAConfig
from hf_accel.gqa.conversion import PLAIN, reshaped_model, share_equal, with_kv_heads
from hf_accel.gqa.converting import Converted, convert_into
from hf_accel.gqa.heads import attention_layers, layers_of
from hf_accel.gqa.preview import GQAPreview, cache_bytes, previewed
from hf_accel.gqa.text import text_for


class GQAPatcher(Patcher[GQAConfig], config=GQAConfig):
    stage = Stage.ARCHITECTURE
    fidelity = Fidelity.LOSSY
    occupies = "key and value heads"
    is_fitted_to_text = True

    def obstacles(self, setting: Setting) -> list[str]:
        try:
            check_heads(setting.model, self.config.num_kv_heads)
        except (ConfigError, UnsupportedModelError) as error:
            return [str(error)]
        return []

    @torch.inference_mode(False)
    def preview(self, setting: Setting) -> GQAPreview:
        return previewed(twin(setting.model), self.config, setting.calibration, setting.advance)

    @torch.inference_mode(False)  # what is made under it cannot be fitted
    def patch(self, setting: Setting, host: Host) -> Change:
        model, before = setting.model, setting.anatomy.weight_bytes
        trial = twin(model)
        layers = attention_layers(model)
        ids = None
        if self.config.method == "aligned":
            ids = text_for(trial, self.config, setting.calibration).ids
        old_cache = cache_bytes(trial)
        new = reshaped_model(trial, self.config.num_kv_heads, shares=True)
        made = convert_into(new, trial, self.config, ids, setting.advance)
        share_equal(new, trial)
        new_cache = cache_bytes(new)
        added = _put_in_place(model, new, host.journal)
        return Change(
            f"{layers[0].kv_heads} -> {self.config.num_kv_heads} key/value heads ({told(made, self.config)}); cache "
            f"{old_cache} -> {new_cache} bytes per token; weights {before / 1e6:.1f} -> "
            f"{setting.anatomy.weight_bytes / 1e6:.1f} MB",
            extra_bytes=added if host.journal.originals != "drop" else 0,
            weight_bytes=setting.anatomy.weight_bytes,
        )


def check_heads(model: Any, kv_heads: int) -> None:
    """Raise unless `model` can have `kv_heads` key and value heads, and has more.

    Raises:
        ConfigError: they do not divide its query heads, or are not fewer than it has.
        UnsupportedModelError: heads cannot be read, or the architecture cannot express them.
    """
    layers = attention_layers(model)
    if kv_heads >= layers[0].kv_heads:
        raise ConfigError(
            f"{kv_heads} key/value heads were asked for, and the model has {layers[0].kv_heads}; ask for fewer."
        )
    with_kv_heads(model.config, kv_heads)


def told(made: list[Converted], config: GQAConfig) -> str:
    """Return in a few words how heads were converted and what it did to the outputs of layers."""
    errors = [layer.errors for layer in made if layer.errors is not None]
    if not errors:
        return f"method {config.method}"
    before, after = (sum(values) / len(errors) for values in zip(*((e.before, e.after) for e in errors), strict=True))
    return f"aligned; outputs of layers off by {before:.3f} of their norm, {after:.3f} after repair"


def _put_in_place(model: Any, new: Any, journal: Journal) -> int:
    """Exchange products of attention and the numbers that modules keep, and return the bytes of the new products."""
    added = 0
    for old, made in zip(attention_layers(model), layers_of(new), strict=True):
        for name in sorted(old.products):
            before, product = old.module.get_submodule(name), made.module.get_submodule(name)
            if all(parameter is own for parameter, own in zip(product.parameters(), before.parameters(), strict=True)):
                continue  # it is as it was
            product.train(before.training)
            added += sum(p.numel() * p.element_size() for p in product.parameters())
            journal.swap_module(old.module, name, product)
    configs = own_configs(model, journal)  # other models of the same config keep their heads
    fresh = dict(new.named_modules())
    for path, module in model.named_modules():
        if path not in fresh:
            continue
        for name, value in vars(fresh[path]).items():
            if isinstance(value, PLAIN) and name != "training" and vars(module).get(name, value) != value:
                journal.set_attribute(module, name, value)
    for config in configs:
        if type(config) is not type(model.config):
            continue
        for name, value in vars(new.config).items():
            if isinstance(value, PLAIN) and not name.startswith("_") and vars(config).get(name) != value:
                journal.set_attribute(config, name, value)
    return added
