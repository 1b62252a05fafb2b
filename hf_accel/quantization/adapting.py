"""LoRA under fake quantization: the adapter's addition to a weight is rounded together with it.

peft adds its low-rank product beside a layer: y = x Q(W)^T + x (B A)^T. Merged, that becomes Q(W + B A), which is
another function. Here training computes with Q(W + s B A) from the first step on, so that merging changes nothing:
what is converted then is what was trained. (Hu et al. 2021, arXiv:2106.09685; peft's own classes hold and merge the
adapters.)
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

from hf_accel.core.model.support import unwrap
from hf_accel.errors import ConfigError, MissingDependencyError, UnsupportedModelError
from hf_accel.quantization.learned import trained_products
from hf_accel.quantization.modules.fake_linear import FakeQuantizedLinear

_ALL = "all-linear"


def get_qat_peft_model(model: Any, config: Any, **options: Any) -> Any:
    """Return `model` with adapters as peft's `get_peft_model` does, whose additions are under fake quantization.

    Train it, then `model.merge_and_unload()` and `hf_accel.convert_qat(model)`. Scales are trained by the adapters'
    optimizer, too, where their QATConfig says so.

    Args:
        model: the model that `hf_accel.optimize(model, QATConfig(...))` prepared.
        config: a peft.LoraConfig. Target modules are matched among the products in training; "all-linear" and None
            name all of them. It is changed, as `get_peft_model` changes it.
        options: of peft's `get_peft_model`.

    Raises:
        UnsupportedModelError: no product is in training.
        ConfigError: the config is no LoraConfig, or asks for what cannot be merged into a rounded weight: dropout, a
            bias, DoRA or another variant; or its target modules are none of the products in training.
        MissingDependencyError: peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingDependencyError("Adapters need peft: pip install 'hf-accel[peft]'.")
    from peft import LoraConfig, get_peft_model

    paths = [path for path, _, _, _ in trained_products(unwrap(model))]
    if not paths:
        raise UnsupportedModelError(
            "No product of this model is in training under fake quantization. Call hf_accel.optimize(model, "
            "[hf_accel.QATConfig(bits=...)]) before; without it, peft.get_peft_model adds adapters."
        )
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"Adapters under fake quantization are a peft.LoraConfig; {type(config).__name__} was given.")
    if config.lora_dropout or config.lora_bias or config.bias != "none":
        raise ConfigError(
            "An adapter that is rounded with its weight has neither dropout nor a bias: lora_dropout=0, "
            "lora_bias=False, bias='none'."
        )
    if config.target_modules in (None, _ALL):
        config.target_modules = sorted(paths)
    config._register_custom_module({FakeQuantizedLinear: lora_class()})
    scales = {name: p for name, p in model.named_parameters() if name.endswith("log_factors") and p.requires_grad}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by names that are going to be renamed
        try:
            adapted = get_peft_model(model, config, **options)
        except ValueError as error:
            raise ConfigError(f"peft refuses the adapters: {error}") from error
    for parameter in scales.values():  # peft freezes whatever is no adapter
        parameter.requires_grad_(True)
    return adapted


@functools.cache
def lora_class() -> Any:
    """Return the class of peft's layers around a `FakeQuantizedLinear`; peft is loaded at the first call."""
    from peft.tuners.lora.layer import Linear

    class FakeQuantizedLora(Linear):  # type: ignore[misc]
        """peft's linear layer with the addition of the active adapters under the base layer's fake quantization."""

        @property
        def lora_variants(self) -> dict[Any, Any]:
            return {(): None}  # others merge into weights in ways of their own

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self._check_forward_args(x, *args, **kwargs)
            if kwargs.get("adapter_names") is not None:
                raise UnsupportedModelError("Adapters per row cannot be under fake quantization: a weight has one.")
            base: Any = self.get_base_layer()
            if self.disable_adapters:
                if self.merged:
                    self.unmerge()
                return base(x)
            weight = base.weight
            if not self.merged:
                # as merging computes it: not in the precision of autocast
                with torch.autocast(x.device.type, enabled=False):
                    for name in self.active_adapters:
                        if name in self.lora_A:
                            weight = weight + self.get_delta_weight(name)
            return base.product(x, weight)

    return FakeQuantizedLora
