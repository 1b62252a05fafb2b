"""Fills an empty model from a checkpoint: packed modules first, then every other tensor, none of them twice in memory.

Each tensor of the model must be in the files, and each in the files must be asked for. Cost: one unpacked weight.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_accel.errors import CheckpointError
from hf_accel.kernels.weights import PackedWeight
from hf_accel.quantization.files.checkpoint import Checkpoint
from hf_accel.quantization.files.inventory import OWN_TENSORS
from hf_accel.quantization.files.layout import Layout, Source
from hf_accel.quantization.modules.embedding import TABLE_BITS, QuantizedEmbedding
from hf_accel.quantization.modules.linear import QuantizedLinear, linear_weight
from hf_accel.quantization.modules.permuted import PermutedLinear

_OUTDATED = (r"rotary_emb\.inv_freq$",)  # computed from the config since transformers 4.32


class Filler:
    """Fills one empty model from a checkpoint.

    used: tensors that it has taken; filled: names in the model of those that it has put there by other names.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, dtype: torch.dtype | None) -> None:
        self.model, self.checkpoint, self.dtype = model, checkpoint, dtype
        self.used: set[str] = set()
        self.filled: set[str] = set()

    def replace(self, name: str, module: Any, layout: Layout) -> None:
        """Put a packed product or table in the place of the module called `name`."""
        if isinstance(module, nn.Embedding):
            rows, columns = module.weight.shape
            self.put(name, self._table(name, module, self.packed(name, rows, columns, layout)[0]))
            return
        rows, columns = linear_weight(module).shape
        packed, order = self.packed(name, rows, columns, layout)
        if module.bias is None:
            self._skip_bias(name, rows)
        product: nn.Module = QuantizedLinear(packed, module.bias if order is None else None, self.model.dtype)
        if order is not None:
            product = PermutedLinear(product, order, module.bias)  # type: ignore[arg-type]
        self.put(name, product)

    def _table(self, name: str, module: nn.Embedding, packed: PackedWeight) -> QuantizedEmbedding:
        try:
            if packed.scheme.bits in TABLE_BITS:
                return QuantizedEmbedding(packed, module)
            reason = f"{packed.scheme.bits} bits are none of {TABLE_BITS}"
        except ValueError as error:
            reason = str(error)
        raise CheckpointError(
            f"{self.checkpoint.listing}, module {name}: a packed table of embeddings is not served here, for {reason}. "
            "Load the folder with AutoModelForCausalLM."
        )

    def _skip_bias(self, name: str, rows: int) -> None:
        """Leave out the bias of zeros that old packers of GPTQ gave to products without one."""
        if f"{name}.bias" in self.checkpoint:
            if bool(self.checkpoint.tensor(f"{name}.bias", (rows,)).any()):
                raise self.checkpoint.damaged(f"{name}.bias", "the model that config.json describes has no such bias")
            self.used.add(f"{name}.bias")

    def share(self, name: str, source: str) -> None:
        """Put a table of embeddings that has the codes of the product `source` in the place of `name`."""
        modules = dict(self.model.named_modules())
        table, product = modules.get(name), modules.get(source)
        if not isinstance(table, nn.Embedding) or not isinstance(product, QuantizedLinear):
            raise CheckpointError(
                f"{self.checkpoint.listing}: config.json says that {name} has the codes of {source}, but the first is "
                "not a table of embeddings or the second is not a packed product."
            )
        self.put(name, self._table(name, table, product.packed))

    def fill(self) -> None:
        """Fill everything that is not packed, tie what is tied, and check that nothing is missing or left over."""
        model, checkpoint = self.model, self.checkpoint
        tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
        for name in self._unpacked_names():
            if name in tied and name not in checkpoint:
                continue
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            before = getattr(module, leaf)
            if before.is_floating_point():
                value = checkpoint.tensor(name, before.shape)
                value = value.to(self.dtype or value.dtype, copy=True)
            else:
                value = checkpoint.tensor(name, before.shape, (before.dtype,)).clone()
            self.used.add(name)
            if leaf in module._parameters:
                trains = before.requires_grad
                module._parameters[leaf] = nn.Parameter(value, requires_grad=trains)
            else:
                module._buffers[leaf] = value
        ignorable = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), *_OUTDATED]
        for name in checkpoint.files.keys() - self.used:
            if name not in tied and not any(re.search(pattern, name) for pattern in ignorable):
                raise checkpoint.damaged(name, "the model that config.json describes has no such tensor")
        _compute_buffers(model)
        model.tie_weights()

    def _unpacked_names(self) -> list[str]:
        packed = {
            f"{name}.{tensor}"
            for name, module in self.model.named_modules()
            if isinstance(module, (QuantizedLinear, QuantizedEmbedding, PermutedLinear))
            for tensor in OWN_TENSORS
        }
        return [name for name in self.model.state_dict() if name not in packed | self.filled]

    def packed(self, name: str, rows: int, columns: int, layout: Layout) -> tuple[PackedWeight, Tensor | None]:
        """Return the weight called `name`, and the column of the model that each of its columns reads.

        Raises:
            CheckpointError: a tensor is missing or damaged, or holds what cannot be served.
        """
        source = Source(self.checkpoint, name)
        weight, order = layout.read(source, rows, columns)
        self.used |= source.used
        return weight if isinstance(weight, PackedWeight) else PackedWeight.pack(weight), order

    def put(self, name: str, module: nn.Module) -> None:
        """Put a module in the place of the one called `name`."""
        parent, _, leaf = name.rpartition(".")
        self.model.get_submodule(parent)._modules[leaf] = module


def _compute_buffers(model: Any) -> None:
    """Let modules compute the buffers that no checkpoint holds, where the architecture does so by initialising."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor._is_hf_initialized = True
    owners: dict[str, Any] = {}  # each module is initialised by the nearest model that holds it
    for name, module in model.named_modules():
        owner = module if isinstance(module, PreTrainedModel) else owners[name.rpartition(".")[0]]
        owners[name] = owner
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
            continue  # complete, and no weights to initialise
        own = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        for buffer in own:
            module._buffers[buffer]._is_hf_initialized = False  # type: ignore[union-attr]
        if own:
            owner._init_weights(module)
