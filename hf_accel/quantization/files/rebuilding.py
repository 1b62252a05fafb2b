"""What a loader will build of a saved config, found out on the meta device before anything is written.

Two loaders open what we save: ours, and in the published layout stock transformers with compressed-tensors. Cost: the
model's empty skeleton.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights
from transformers.quantizers import base as quantizers

from hf_accel.core.model.anatomy import Anatomy
from hf_accel.errors import described
from hf_accel.ops.affine import Scheme
from hf_accel.quantization.files import gptq, mxfp4
from hf_accel.quantization.files.formats import METHOD, SUFFIXES, stored_shapes
from hf_accel.quantization.modules.experts import known_layout, shape_of
from hf_accel.quantization.modules.linear import linear_weight

EXPERT = re.compile(r"(.+)\.(gate_up_proj|down_proj)\.(\d+)")
Shapes = dict[str, tuple[int, ...]]
_EXCHANGED: dict[str, Any] = getattr(quantizers, "MODULES_TO_PATCH_FOR_QUANTIZATION", {})


def saved_and_read(config: Any) -> Any:
    """Return a transformers config as it comes back from its config.json, without its `quantization_config`.

    Raises: whatever transformers raises of a config that does not come back.
    """
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        found = AutoConfig.from_pretrained(folder)
    del found.quantization_config
    return found


def model_class(config: Any) -> type[PreTrainedModel]:
    """Return the class that `architectures` names, if transformers has it, else what AutoModelForCausalLM builds.

    Raises:
        ValueError: there is no such class.
    """
    name = next(iter(getattr(config, "architectures", None) or ()), None)
    named = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(named, type) and issubclass(named, PreTrainedModel)):
        named = None
    fits = named is not None and isinstance(config, named.config_class or ())
    found = named if fits else causal_class(config) or named
    if found is None:
        raise ValueError(
            f"transformers has no model {name!r}, and no causal language model of a {type(config).__name__}"
        )
    return found


def causal_class(config: Any) -> type[PreTrainedModel] | None:
    """Return the class that AutoModelForCausalLM builds of `config`."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return found[0] if isinstance(found, (tuple, list)) else found


def skeleton(config: Any, dtype: torch.dtype | None = None) -> Any:
    """Return the model that a loader builds of `config`, without memory; `dtype`: of its weights, None: as torch's."""
    cls: Any = model_class(config)
    with torch.device("meta"), no_init_weights():
        return cls(config) if dtype is None else cls._from_config(copy.deepcopy(config), dtype=dtype)


def wanted_shapes(empty: Any, schemes: Mapping[str, Scheme], tables: Iterable[str]) -> Shapes:
    """Return name -> shape of every tensor that our loader asks for to fill `empty`.

    schemes: of packed weights, by name; tables: embeddings whose codes are those of a packed weight.
    Names that are tied to others are among them.

    Raises:
        ValueError: the model has no such weight.
    """
    modules = dict(empty.named_modules())
    wanted: Shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    for name in tables:
        wanted.pop(f"{name}.weight", None)
    for name, scheme in schemes.items():
        module = modules.get(name)
        if isinstance(module, nn.Embedding):
            rows, columns = module.weight.shape
            wanted.pop(f"{name}.weight", None)
        elif isinstance(module, Anatomy.PRODUCTS):
            product: Any = module
            rows, columns = linear_weight(product).shape
            wanted.pop(f"{name}.weight", None)
        elif (match := EXPERT.fullmatch(name)) and (layout := known_layout(modules.get(match[1]))) is not None:
            rows, columns = shape_of(layout, match[2])
            wanted.pop(f"{match[1]}.{match[2]}", None)
            if layout.biased:
                wanted.pop(f"{match[1]}.{match[2]}_bias", None)
                wanted[f"{name}.bias"] = (rows,)
        else:
            raise ValueError(f"it has no product {name}")
        wanted |= {f"{name}.{suffix}": shape for suffix, shape in stored_shapes(scheme, rows, columns).items()}
    return wanted


def tied_names(model: Any) -> dict[str, str]:
    """Return name -> source of the tensors that transformers ties to others."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def obstacle_to_stock(empty: Any, packed: Iterable[str], stored: Iterable[str]) -> str:
    """Return why stock transformers would not load what is stored into such a model, or "".

    packed: names of packed products; stored: of all tensors. Packed products of `empty` lose their weights.
    """
    if (other := causal_class(empty.config)) is not None and other is not type(empty):
        return f"AutoModelForCausalLM builds a {other.__name__} of its config"
    for name, module in empty.named_modules():
        methods = _EXCHANGED.get(type(module).__name__, {}).get("quantization_methods", ())
        if any(getattr(method, "value", method) == METHOD for method in methods):
            return f"transformers exchanges {name} before it loads packed weights"
    for name in packed:
        if not isinstance(empty.get_submodule(name), nn.Linear):
            return f"{name} stands for a {type(empty.get_submodule(name)).__name__}"
    if any(isinstance(conversion, WeightConverter) for conversion in get_model_conversion_mapping(empty)):
        return "its checkpoints store experts one by one"
    for name, loaded in loaded_names(empty, stored).items():
        if loaded != name:
            return f"transformers loads {name} as {loaded}"
    return _initialising(empty, packed)


def loaded_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Return name in a checkpoint -> name in the model, as transformers renames the tensors of an architecture."""
    conversions = get_model_conversion_mapping(model)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    names = dict.fromkeys(stored, True)
    # transformers asks the model's state for names with and without the prefix; that of packed weights is on files only
    state = dict.fromkeys(model.state_dict(), True)
    modules = [name.rpartition(".")[0] for name in state]
    state |= {f"{name}.{suffix}": True for name in modules for suffix in (*SUFFIXES, *gptq.SUFFIXES, "bias")}
    state |= {f"{name}.{suffix}": True for name in modules for suffix in mxfp4.SUFFIXES}
    return {name: rename_source_key(name, renamings, [], model.base_model_prefix, state)[0] for name in names}


def _initialising(empty: Any, packed: Iterable[str]) -> str:
    """Return why transformers could not initialise the model, as it does once weights are loaded, or "".

    Some architectures then ask for weights that are packed. `empty` loses the weights of its packed products.
    """
    for name in packed:
        empty.get_submodule(name)._parameters.pop("weight")
    for tensor in [*empty.parameters(), *empty.buffers()]:
        tensor._is_hf_initialized = True
    try:
        empty.initialize_weights()
    except Exception as error:
        return f"transformers cannot initialise it with packed weights: {described(error)}"
    return ""
