"""What a model with packed weights consists of on disk, and whether the published format can hold it.

Products that stand for `nn.Linear` fit the published layout. Packed `Conv1D`, experts and embeddings do not; with any
of them the model is stored in a layout of our own, in files that nothing else opens. Cost: the model's empty skeleton.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.initialization import no_init_weights

from hf_accel.errors import UnsupportedModelError
from hf_accel.kernels.packed import PackedWeight
from hf_accel.quantization.embedding import QuantizedEmbedding
from hf_accel.quantization.experts import QuantizedExperts
from hf_accel.quantization.formats import to_config, to_tensors
from hf_accel.quantization.linear import QuantizedLinear

_OWN_BUFFERS = ("codes", "scales", "offsets")


@dataclass
class Inventory:
    """The parts of a model to store.

    packed: name -> weight, in the model's order; shared: name of a table of embeddings -> name of the product with the
    same codes; plain: name -> tensor stored as it is; private_reason: why the published layout cannot hold it, or "".
    """

    packed: dict[str, PackedWeight] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)
    ignore: list[str] = field(default_factory=list)
    private_reason: str = ""
    dtype: torch.dtype = torch.float32

    @property
    def is_public(self) -> bool:
        return not self.private_reason

    def config(self) -> dict[str, Any]:
        """Return the `quantization_config` that describes the stored model."""
        config = to_config({name: weight.scheme for name, weight in self.packed.items()}, self.ignore, self.is_public)
        return config if self.is_public else config | {"shared": self.shared}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return full name -> tensor of the packed weight called `name`, made on the spot."""
        weight = self.packed[name].unpack()
        return {f"{name}.{suffix}": tensor for suffix, tensor in to_tensors(weight, self.dtype).items()}


def take_inventory(model: Any) -> Inventory:
    """Return what there is to store of a model with packed weights.

    Raises:
        UnsupportedModelError: parts of it are not the architecture's, as those of an adapter; or none is packed.
    """
    found = Inventory(dtype=model.dtype)
    originals = dict(_skeleton(model).named_modules())
    places: dict[int, str] = {}
    tables: dict[str, QuantizedEmbedding] = {}
    module: Any
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            found.packed[name] = module.packed
            places[module.packed.codes.data_ptr()] = name
            if name in originals and not isinstance(originals[name], nn.Linear):
                found.private_reason = f"{name} stands for a {type(originals[name]).__name__}"
        elif isinstance(module, QuantizedEmbedding):
            tables[name] = module
            found.private_reason = f"{name} is a packed table of embeddings"
        elif isinstance(module, QuantizedExperts):
            found.private_reason = f"{name} holds packed experts"
        elif isinstance(module, nn.Linear):
            found.ignore.append(name)
    if not found.packed and not tables:
        raise UnsupportedModelError(f"This {type(model).__name__} has no packed weights; save it as any other model.")
    for name, table in tables.items():
        if (product := places.get(table.packed.codes.data_ptr())) is not None:
            found.shared[name] = product
        else:
            found.packed[name] = table.packed
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    if found.is_public and any(isinstance(conversion, WeightConverter) for conversion in conversions):
        found.private_reason = "its checkpoints store experts one by one"
    found.plain = _plain(model, {*found.packed, *tables})
    _check_parts(model, found, {*originals} | {""}, tables)
    return found


def _plain(model: Any, packed: set[str]) -> dict[str, Tensor]:
    """Every tensor of the state that is not part of a packed weight; of tied ones, the one that is not derived."""
    own = {f"{name}.{buffer}" for name in packed for buffer in _OWN_BUFFERS}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in own}
    tied = {
        name
        for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items()
        if name in state and source in state and state[name].data_ptr() == state[source].data_ptr()
    }
    return {name: tensor for name, tensor in state.items() if name not in tied}


def _check_parts(model: Any, found: Inventory, modules: set[str], tables: dict[str, Any]) -> None:
    experts = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, QuantizedExperts))
    for name in [*found.plain, *found.packed, *tables]:
        home = name.rpartition(".")[0] if name in found.plain else name
        if home not in modules and not (experts and home.startswith(experts)):
            raise UnsupportedModelError(
                f"{name} is no part of a plain {type(model).__name__} (an adapter?), so the model cannot be saved with "
                "its packed weights. Save the adapter by itself, or hf_accel.restore(model) and save that."
            )


def _skeleton(model: Any) -> nn.Module:
    """The architecture of `model` as its config describes it, without weights."""
    config = copy.deepcopy(model.config)
    with torch.device("meta"), no_init_weights():
        return type(model)(config)  # type: ignore[no-any-return]
