"""A model of a named shape with random weights that is packed from the start: full precision never exists as a whole.

The model is built on the meta device. One product, or one layer's experts, is initialised and rounded for each shape
and scheme; all others of that shape have its rows in another order and memory of their own, so that each layer is read
where it lies, and no two are alike: under layers that are, all tokens become one, and go to the same experts. It shows
speed, never quality. Cost: the packed model and, once per shape, one module in full precision.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from hf_accel.core.journal import Journal
from hf_accel.core.model.anatomy import Anatomy, holds_experts
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import ConfigError, UnsupportedModelError
from hf_accel.measure import shape_config
from hf_accel.measure.subjects.shapes import without_end
from hf_accel.ops import fp4
from hf_accel.ops.affine import quantize
from hf_accel.quantization.config import WeightOnlyConfig
from hf_accel.quantization.files.mxfp4 import SCHEME
from hf_accel.quantization.files.seal import Seal
from hf_accel.quantization.modules.experts import PRODUCTS, QuantizedExperts, packed_product, weight_of
from hf_accel.quantization.modules.linear import QuantizedLinear
from hf_accel.quantization.patcher import WeightOnlyPatcher, untie
from hf_accel.quantization.targets import Target, targets

CPU = torch.device("cpu")


def build_packed(
    name: str, dtype: torch.dtype, *, bits: int | None = 4, group_size: int | None = None, layers: int | None = None
) -> PreTrainedModel:
    """Return a model of a named shape as `WeightOnlyConfig(bits=bits, group_size=group_size)` leaves it, on the CPU.

    Args:
        name: one of `hf_accel.measure.SHAPES`.
        dtype: of what is not packed.
        bits: None: experts are in MXFP4 and all else is in `dtype`, as gpt-oss models are published.
        layers: how many decoder layers it has, as of `build_shape`.

    Raises:
        ConfigError: there is no such shape, or no such number of bits or layers; or MXFP4 without experts.
        UnsupportedModelError: its experts cannot be packed; they are most of what it weighs.
    """
    config = shape_config(name, layers)
    patcher = WeightOnlyPatcher(WeightOnlyConfig(bits=4 if bits is None else bits, group_size=group_size))
    with torch.device("meta"), no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    setting = Setting(Anatomy(model, CPU, dtype))
    chosen, skipped = targets(setting.anatomy, patcher.config)
    packed = {id(target.module) for target in chosen}
    if any(holds_experts(module) and id(module) not in packed for module in model.modules()):
        raise UnsupportedModelError(
            f"The shape {name!r} cannot be built packed ({'; '.join(skipped)}). Build a few layers of it in full "
            "precision: build_shape(name, dtype, layers=2)."
        )
    if bits is None:
        chosen = [target for target in chosen if target.layout is not None]
        if not chosen or group_size is not None:
            raise ConfigError(
                f"MXFP4 is for experts, in groups of {fp4.GROUP}; the shape {name!r} has "
                f"{'some' if chosen else 'none'}, and group_size={group_size} was given. Name bits."
            )
    elif config.tie_word_embeddings:
        untie(model, Journal())
    made: dict[Hashable, nn.Module] = {}
    for number, target in enumerate(chosen):
        key = _kind(target, patcher.config)
        if key not in made:
            original = _initialised(model, target.module)
            made[key] = _in_mxfp4(target, dtype) if bits is None else patcher.prepared(target, original, setting)
            target.parent._modules[target.name] = made[key]
        else:
            target.parent._modules[target.name] = _turned(made[key], number)
    for module in model.modules():
        if any(tensor.is_meta for tensor in _own(module)):
            _initialised(model, module)
    model.tie_weights()  # what shares a weight was initialised apart
    model.hf_quantizer = Seal()
    return without_end(model.eval())  # the packed modules, too


def _in_mxfp4(target: Target, dtype: torch.dtype) -> QuantizedExperts:
    """Return experts whose weights are rounded to MXFP4, as the specification converts them."""
    module: Any = target.module
    layout: Any = target.layout
    gate_up, down = (
        [
            packed_product(module, layout, name, index, quantize(weight_of(module, layout, name, index), SCHEME), dtype)
            for index in range(layout.experts)
        ]
        for name in PRODUCTS
    )
    return QuantizedExperts(gate_up, down, module)


def _kind(target: Target, config: WeightOnlyConfig) -> Hashable:
    """Return what two modules have in common that can be copies of one another."""
    shapes = tuple((name, tuple(weight.shape)) for name, weight in target.module.named_parameters())
    return type(target.module), shapes, target.scheme, config.bits_of(target.path), config.group_size_of(target.path)


def _own(module: nn.Module) -> list[Tensor]:
    return [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]


def _initialised(model: Any, module: nn.Module) -> nn.Module:
    """Return `module` of `model` in memory and initialised as transformers does it, its buffers included."""
    module.to_empty(device=CPU, recurse=False)
    model._init_weights(module)
    return module


def _turned(module: nn.Module, steps: int) -> nn.Module:
    """Return a copy whose products have their rows `steps` blocks further on, in tensors of their own.

    Experts go on reading the config that they share with their model.
    """
    owned = (part for inner in module.modules() for part in vars(inner).values())
    shared = {id(part): part for part in owned if isinstance(part, PretrainedConfig)}
    turned = copy.deepcopy(module, shared)
    for product in turned.modules():
        if isinstance(product, QuantizedLinear):
            for tensor in product.buffers():  # [blocks of rows, ...]
                tensor.copy_(tensor.roll(steps % len(tensor), 0))
    return turned
