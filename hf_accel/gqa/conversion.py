"""A model with other key and value heads: a new model of the same class whose other tensors are the same.

What a change of the config means for a class is found out by building it twice without memory, with the old config and
the new: every tensor of another shape, every number that modules keep. Nothing but projections may change shape.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_accel.errors import UnsupportedModelError
from hf_accel.gqa.configs import advice, stated
from hf_accel.gqa.heads import attention_layers, layers_of

PLAIN = (bool, int, float, str, type(None))


def with_kv_heads(config: Any, kv_heads: int) -> Any:
    """Return a deep copy of a transformers config that expresses `kv_heads`.

    Raises:
        ConfigError: `kv_heads` do not divide the query heads.
        UnsupportedModelError: the architecture cannot express it, or tensors other than the projections of keys and
            values would change (norms over all heads); the message names architectures that can.
    """
    new = stated(config, kv_heads)
    with torch.device("meta"):
        before, after = (AutoModelForCausalLM.from_config(copy.deepcopy(each)) for each in (config, new))
    _check_difference(before, after, kv_heads)
    return new


def skeleton(model: Any, config: Any) -> Any:
    """Return a model of the class of `model` with another config, its tensors on the meta device."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(config))


def reshaped_model(model: Any, kv_heads: int, *, shares: bool) -> Any:
    """Return a new model of the class of `model` whose layers have projections for `kv_heads`, not filled yet.

    Every other tensor is that of `model` (shares) or a copy of it. The new model is in eval mode; its own are its
    config, its generation config and its buffers.

    Raises:
        ConfigError: `kv_heads` do not divide the query heads.
        UnsupportedModelError: as attention_layers and with_kv_heads.
    """
    layers = attention_layers(model)
    config = stated(model.config, kv_heads)
    before, after = skeleton(model, model.config), skeleton(model, config)
    _check_difference(before, after, kv_heads)
    replaced = {id(p) for layer in layers for name in layer.products for p in _product(layer.module, name).parameters()}
    memo: dict[int, Any] = {id(model.config): config}
    memo |= {id(p): p for p in model.parameters() if shares or id(p) in replaced}
    new = copy.deepcopy(model, memo).eval()
    _carry_numbers(new, before, after, config)
    for layer in layers:
        for name in layer.products:
            _empty(_product(new.get_submodule(layer.path), name), _product(after.get_submodule(layer.path), name))
    return new


def share_equal(new: Any, model: Any) -> None:
    """Make projections of `new` that are equal to those of `model` the same tensors."""
    for made, old in zip(layers_of(new), layers_of(model), strict=True):
        for name in made.products:
            own, theirs = _product(made.module, name)._parameters, _product(old.module, name)._parameters
            for part, parameter in theirs.items():
                if parameter is not None and own[part] is not None and torch.equal(own[part], parameter):  # type: ignore[arg-type]
                    own[part] = parameter


def _product(module: nn.Module, name: str) -> nn.Module:
    return module._modules[name]  # type: ignore[return-value]


def _empty(product: nn.Module, shaped: nn.Module) -> None:
    """Give a product new parameters in its own dtype and place, and in the shape of those of `shaped`."""
    for name, old in product._parameters.items():
        if old is not None:
            fresh = torch.empty(shaped.get_parameter(name).shape, dtype=old.dtype, device=old.device)
            product._parameters[name] = nn.Parameter(fresh, requires_grad=old.requires_grad)


def _carry_numbers(new: Any, before: Any, after: Any, config: Any) -> None:
    """Write to the modules of `new` what those of `after` keep otherwise than those of `before`."""
    olds, news = dict(before.named_modules()), dict(after.named_modules())
    for path, module in new.named_modules():
        if path not in news:  # of an extension of the user's
            continue
        for name, value in vars(news[path]).items():
            if isinstance(value, PLAIN) and vars(olds[path]).get(name) != value:
                setattr(module, name, value)
        if vars(module).get("config") not in (None, config):  # configs of their own, made while building
            module.config = news[path].config


def _check_difference(before: Any, after: Any, kv_heads: int) -> None:
    """Raise UnsupportedModelError unless `after` has `kv_heads` and differs from `before` in products of them alone."""
    model_type = before.config.model_type
    layers = layers_of(before)
    own = {f"{layer.path}.{name}." for layer in layers for name in layer.products}
    tensors, others = ({name: t.shape for name, t in _tensors(model)} for model in (before, after))
    kinds, other_kinds = ({path: type(module) for path, module in model.named_modules()} for model in (before, after))
    changed = [name for name, shape in others.items() if tensors.get(name) != shape]
    changed += [name for name in tensors if name not in others]
    changed += [path for path, kind in kinds.items() if other_kinds.get(path) is not kind]
    strange = sorted(name for name in changed if not any(name.startswith(part) for part in own))
    if strange:
        raise UnsupportedModelError(
            f"The architecture {model_type} with {kv_heads} key/value heads differs from that with "
            f"{layers[0].kv_heads} in more than its projections: {strange[0]} (one of {len(strange)}). "
            f"{advice(model_type)}"
        )
    if any(layer.kv_heads != kv_heads for layer in layers_of(after)):
        raise UnsupportedModelError(
            f"The architecture {model_type} is built with {layers[0].kv_heads} key/value heads although its config "
            f"says {kv_heads}. {advice(model_type)}"
        )


def _tensors(model: Any) -> Iterable[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
