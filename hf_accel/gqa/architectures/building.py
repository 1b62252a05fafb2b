"""A model of another architecture from tensors: what is equal is shared, nothing is initialised at random."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from hf_accel.errors import UnsupportedModelError
from hf_accel.gqa.heads import Heads, attention_layers, layers_of, read_heads, write_heads

Tensors = dict[str, Tensor]


def refuse(model: Any, target: str, why: str) -> UnsupportedModelError:
    """Return the error that says why this very model is not expressed in `target`."""
    return UnsupportedModelError(f"This {type(model).__name__} cannot be expressed as {target}: {why}.")


def check_rotation(model: Any, target: str) -> None:
    """Raise UnsupportedModelError where an odd number of a head's numbers rotates: GPT-NeoX turns one more then."""
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    if (part := int(size * config.rope_parameters.get("partial_rotary_factor", 1.0))) % 2:
        raise refuse(model, target, f"{part} of {size} numbers of a head rotate, an odd number")


def config_for(model: Any, target: str, **values: Any) -> Any:
    """Return a config of the architecture `target` with what every config has carried over from the model's."""
    config = model.config
    common = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "use_cache")
    values = {name: getattr(config, name) for name in common if hasattr(config, name)} | values
    values["num_hidden_layers"], values["num_attention_heads"] = config.num_hidden_layers, config.num_attention_heads
    values["hidden_size"] = config.hidden_size
    own_names = CONFIG_MAPPING[target].attribute_map  # other numbers follow from these while a config is made
    new = AutoConfig.for_model(target, **{own_names.get(name, name): value for name, value in values.items()})
    new.dtype, new._name_or_path = config.dtype, config._name_or_path
    return new


def built(model: Any, config: Any, tensors: Tensors, heads: Iterable[Heads]) -> Any:
    """Return a model of `config` with `tensors` by their names and the projections of attention by `heads`.

    Parameters among `tensors` are shared. Attention has the dtypes of the layers of `model`, which is not changed;
    its attention back end, its generation config and which parameters are trained are carried over.
    """
    back_end = model.config._attn_implementation
    with torch.device("meta"):
        new = AutoModelForCausalLM.from_config(config, attn_implementation=back_end)
    device = model.device
    for name, buffer in _buffers(config):
        parent, leaf = _place(new, name)
        parent._buffers[leaf] = buffer.to(device)
    for name, tensor in tensors.items():
        parent, leaf = _place(new, name)
        if parent._parameters[leaf].shape != tensor.shape:  # type: ignore[union-attr]
            raise ValueError(f"{name} has the shape {list(tensor.shape)}, not that of {config.model_type}")
        parent._parameters[leaf] = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
    for layer, old, given in zip(layers_of(new), attention_layers(model), heads, strict=True):
        dtype = next(old.module.parameters()).dtype
        for product in layer.products:
            parameters = layer.module.get_submodule(product)._parameters
            for leaf, empty in parameters.items():
                if empty is not None:
                    parameters[leaf] = nn.Parameter(torch.empty(empty.shape, dtype=dtype, device=device))
        write_heads(layer, config, given)
    if config.tie_word_embeddings:
        new.tie_weights()
    if missing := [name for name, tensor in new.named_parameters() if tensor.is_meta]:
        raise ValueError(f"{config.model_type} has tensors that nobody filled: {', '.join(missing)}")
    new.generation_config = copy.deepcopy(model.generation_config)
    return new.eval()


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _buffers(config: Any) -> list[tuple[str, Tensor]]:
    """Return the buffers of a model of `config`: those of one without layers and words, as no layer has any."""
    hull = copy.deepcopy(config)
    hull.num_hidden_layers, hull.vocab_size, hull.pad_token_id = 0, 1, None
    with torch.random.fork_rng(devices=[]):  # the hull's weights are drawn
        return list(AutoModelForCausalLM.from_config(hull, dtype=torch.float32).named_buffers())


def renamed(model: Any, names: dict[str, str], layers: tuple[str, str], layer_names: dict[str, str]) -> Tensors:
    """Return parameters of `model` under other names: those of modules `names`, and in each layer `layer_names`.

    `layers` are the names of the list of layers here and there. Absent biases are left out.
    """
    pairs = dict(names)
    for index in range(len(model.get_submodule(layers[0]))):
        for old, new in layer_names.items():
            pairs[f"{layers[0]}.{index}.{old}"] = f"{layers[1]}.{index}.{new}"
    found = {}
    for old, new in pairs.items():
        for leaf, parameter in model.get_submodule(old)._parameters.items():
            if parameter is not None:
                found[f"{new}.{leaf}"] = parameter
    return found


def with_biases(tensors: Tensors, modules: Iterable[str]) -> Tensors:
    """Return `tensors` with a bias of zeros for every module that has a weight and no bias."""
    found = dict(tensors)
    for module in modules:
        weight = tensors[f"{module}.weight"]
        found.setdefault(f"{module}.bias", weight.new_zeros(weight.shape[0]).detach())
    return found


def folded(weight: Tensor, bias: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Return weight [..., E] and bias [...] in double precision that read what `norm` is before its weight and bias."""
    wide = weight.detach().double()
    offset = wide @ norm.bias.detach().double()
    return wide * norm.weight.detach().double(), offset if bias is None else offset + bias.detach().double()


def heads_of(model: Any) -> Iterable[Heads]:
    """Yield the projections of a model, layer by layer."""
    return (read_heads(layer, model.config) for layer in attention_layers(model))
