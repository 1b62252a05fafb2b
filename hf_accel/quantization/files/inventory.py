"""What a model with packed weights consists of on disk, and whether the published format can hold it.

Products that stand for `nn.Linear` fit the published layout, if stock transformers builds the model of its saved config
as it is. Packed `Conv1D`, experts and embeddings do not fit; with any of them the model is stored in a layout of our
own, in files that nothing else opens. Cost: the model's empty skeleton.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_accel.errors import UnsupportedModelError, described
from hf_accel.kernels.weights import PackedWeight
from hf_accel.quantization.files import mxfp4
from hf_accel.quantization.files.formats import stored_shapes, to_config, to_tensors
from hf_accel.quantization.files.rebuilding import (
    Shapes,
    obstacle_to_stock,
    saved_and_read,
    skeleton,
    tied_names,
    wanted_shapes,
)
from hf_accel.quantization.modules.embedding import QuantizedEmbedding
from hf_accel.quantization.modules.experts import QuantizedExperts
from hf_accel.quantization.modules.linear import QuantizedLinear
from hf_accel.quantization.modules.permuted import PermutedLinear

OWN_TENSORS = ("codes", "scales", "offsets", "like", "order")  # of packed modules, in the model's state
_WAY_OUT = "Make the config say what the model is, or hf_accel.restore(model) and save that."


@dataclass
class Inventory:
    """The parts of a model to store.

    packed: name -> weight, in the model's order; orders: name -> the column of the model that each column of the weight
    reads, where they differ; shared: name of a table of embeddings -> name of the product with the same codes; plain:
    name -> tensor stored as it is; ignore: names of products that are not packed; head: name of the output head;
    misfit: why no published layout can hold it, or ""; saved_config: the transformers config to write, of the layout
    chosen.
    """

    packed: dict[str, PackedWeight] = field(default_factory=dict)
    orders: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)
    ignore: list[str] = field(default_factory=list)
    head: str = ""
    misfit: str = ""
    dtype: torch.dtype = torch.float32
    saved_config: Any = None

    @property
    def private_reason(self) -> str:
        """Return why compressed-tensors cannot hold the model, or ""."""
        if self.misfit or not self.orders:
            return self.misfit
        return f"{min(self.orders)} has groups of columns in an order that its package no longer reads"

    @property
    def is_public(self) -> bool:
        return not self.private_reason

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Return name -> content of files to write beside the config."""
        return {}

    def shapes(self) -> Shapes:
        """Return name -> shape of every tensor to store, but for orders of columns."""
        shapes: Shapes = {name: tuple(tensor.shape) for name, tensor in self.plain.items()}
        for name, weight in self.packed.items():
            stored = stored_shapes(weight.scheme, weight.rows, weight.columns)
            shapes |= {f"{name}.{suffix}": shape for suffix, shape in stored.items()}
        return shapes

    def config(self) -> dict[str, Any]:
        """Return the `quantization_config` that describes the stored model."""
        schemes = {name: weight.scheme for name, weight in self.packed.items()}
        config = to_config(schemes, self.ignore, self.is_public, self.orders)
        return config if self.is_public else config | {"shared": self.shared}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return full name -> tensor of the packed weight called `name`, made on the spot."""
        weight = self.packed[name]
        if weight.scheme.code_book:
            tensors = mxfp4.to_tensors(weight)
        else:
            tensors = to_tensors(weight.unpack(), self.dtype, self.orders.get(name))
        return {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}

    def sizes(self, name: str) -> dict[str, int]:
        """Return suffix -> bytes of the tensors of the packed weight called `name`."""
        weight = self.packed[name]
        if weight.scheme.code_book:
            return {s: math.prod(shape) for s, shape in mxfp4.stored_shapes(weight.rows, weight.columns).items()}
        width = {"weight_scale": self.dtype.itemsize, "weight_shape": 8}
        shapes = stored_shapes(weight.scheme, weight.rows, weight.columns)
        if name in self.orders:
            shapes["weight_g_idx"] = (weight.columns,)
        return {suffix: math.prod(shape) * width.get(suffix, 4) for suffix, shape in shapes.items()}


def take_inventory(model: Any) -> Inventory:
    """Return what there is to store of a model with packed weights.

    Raises:
        UnsupportedModelError: parts of it are not the architecture's, as those of an adapter; or no loader would build
            it of its config; or none of it is packed.
    """
    found = Inventory(dtype=model.dtype)
    places: dict[int, str] = {}
    tables: dict[str, QuantizedEmbedding] = {}
    module: Any
    head = model.get_output_embeddings()
    inner: set[str] = set()  # products that are part of a permuted one
    for name, module in model.named_modules():
        if module is head:
            found.head = name
        if isinstance(module, PermutedLinear):
            found.packed[name], found.orders[name] = module.inner.packed, module.order
            inner.add(f"{name}.inner")
        elif isinstance(module, QuantizedLinear):
            if name in inner:
                continue
            found.packed[name] = module.packed
            places[module.packed.codes.data_ptr()] = name
        elif isinstance(module, QuantizedEmbedding):
            tables[name] = module
            found.misfit = f"{name} is a packed table of embeddings"
        elif isinstance(module, QuantizedExperts):
            found.misfit = f"{name} holds packed experts"
        elif isinstance(module, nn.Linear):
            found.ignore.append(name)
    if not found.packed and not tables:
        raise UnsupportedModelError(f"This {type(model).__name__} has no packed weights; save it as any other model.")
    for name, weight in found.packed.items():
        if not weight.has_whole_zeros:
            raise UnsupportedModelError(
                f"The groups of {name} have offsets that are no multiples of their scales (read from a GGUF file?), "
                f"which "
                "no format of checkpoints holds. Write the model by hf_accel.export_gguf, which does."
            )
    for name, table in tables.items():
        if (product := places.get(table.packed.codes.data_ptr())) is not None:
            found.shared[name] = product
        else:
            found.packed[name] = table.packed
    found.plain = _plain(model, {*found.packed, *tables}, inner)
    empty = _rebuilt(model, found, tables)
    if not found.misfit:
        found.misfit = obstacle_to_stock(empty, found.packed, found.shapes())
    found.saved_config = saved_config(model, found)
    return found


def saved_config(model: Any, found: Inventory) -> Any:
    """Return a copy of the model's config as it is to be saved with what was found."""
    config = copy.deepcopy(model.config)
    config.dtype = str(found.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.quantization_config = found.config()
    head = model.get_output_embeddings()
    is_tied = head is not None and getattr(head, "weight", None) is model.get_input_embeddings().weight
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        if getattr(part, "tie_word_embeddings", False) and not is_tied:
            part.tie_word_embeddings = False
    return config


def written(config: Any) -> dict[str, Any]:
    """Return what config.json will say of a transformers config."""
    return json.loads(config.to_json_string())  # type: ignore[no-any-return]


def _plain(model: Any, packed: set[str], inner: set[str]) -> dict[str, Tensor]:
    """Return the tensors of the state that are not part of a packed weight; of tied ones, only the source."""
    own = {f"{name}.{tensor}" for name in packed | inner for tensor in OWN_TENSORS}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in own}
    tied = {
        name
        for name, source in tied_names(model).items()
        if name in state and source in state and state[name].data_ptr() == state[source].data_ptr()
    }
    return {name: tensor for name, tensor in state.items() if name not in tied}


def _rebuilt(model: Any, found: Inventory, tables: dict[str, Any]) -> Any:
    """Return the empty model that our loader will fill, having seen that it asks for just what is stored."""
    kind = type(model).__name__
    try:
        empty = skeleton(saved_and_read(saved_config(model, found)))
    except Exception as error:
        raise UnsupportedModelError(
            f"No {kind} can be built of the config that would be saved ({described(error)}), so nothing could load "
            "what is saved. " + _WAY_OUT
        ) from error
    _check_parts(model, found, {name for name, _ in empty.named_modules()} | {""}, tables)
    if not isinstance(model, type(empty)):
        raise UnsupportedModelError(f"The config that would be saved leads to a {type(empty).__name__}. " + _WAY_OUT)
    schemes = {name: weight.scheme for name, weight in found.packed.items()}
    stored, tied = found.shapes(), tied_names(empty)
    try:
        wanted = wanted_shapes(empty, schemes, found.shared)
    except ValueError as error:
        raise UnsupportedModelError(
            f"A {kind} of the config that would be saved is another: {error}. " + _WAY_OUT
        ) from error
    for name in [*stored, *wanted]:
        if stored.get(name) != wanted.get(name) and not (name in tied and name not in stored):
            raise UnsupportedModelError(
                f"{name} has the shape {stored.get(name)} here and {wanted.get(name)} in a {kind} of the config that "
                "would be saved, so nothing could load what is saved. " + _WAY_OUT
            )
    return empty


def _check_parts(model: Any, found: Inventory, modules: set[str], tables: dict[str, Any]) -> None:
    experts = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, QuantizedExperts))
    for name in [*found.plain, *found.packed, *tables]:
        home = name.rpartition(".")[0] if name in found.plain else name
        if home not in modules and not (experts and home.startswith(experts)):
            raise UnsupportedModelError(
                f"{name} is no part of a plain {type(model).__name__} (an adapter?), so the model cannot be saved with "
                "its packed weights. Save the adapter by itself, or hf_accel.restore(model) and save that."
            )
