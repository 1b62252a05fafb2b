"""Loading a model with packed weights: an empty model, packed products in their places, then one tensor at a time.

Every parameter is filled from the files or the load fails; nothing is ever left as it was initialised. Cost: the packed
model and one unpacked weight.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from hf_accel.core.failures import converting
from hf_accel.core.model.anatomy import Anatomy
from hf_accel.errors import CheckpointError, ConfigError, MissingDependencyError, described
from hf_accel.kernels.packed import PackedWeight
from hf_accel.ops.affine import Scheme
from hf_accel.quantization.files.checkpoint import Checkpoint, read_json
from hf_accel.quantization.files.formats import PRIVATE_METHOD, Rules, from_tensors, stored_names, stored_shapes
from hf_accel.quantization.files.inventory import OWN_TENSORS
from hf_accel.quantization.files.rebuilding import EXPERT, loaded_names, model_class
from hf_accel.quantization.files.saving import PRIVATE_STEM, PUBLIC_STEM
from hf_accel.quantization.files.seal import Seal
from hf_accel.quantization.modules.embedding import QuantizedEmbedding
from hf_accel.quantization.modules.experts import QuantizedExperts, has_known_layout
from hf_accel.quantization.modules.linear import QuantizedLinear, linear_weight

_CONFIG = "config.json"


def from_pretrained(
    folder: str | os.PathLike[str], dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> Any:
    """Load a model that `save_pretrained` wrote, with packed weights or without, in evaluation mode.

    Reads compressed-tensors checkpoints (`pack-quantized`, weights of 4 or 8 bits) of any origin, without that package.
    The model is of the class that was saved. A folder without packed weights is loaded by transformers.

    Args:
        folder: a local folder, or the name of a model on the hub.
        dtype: of everything that is not packed; None: as stored.
        device: where the model is put; None: the CPU.

    Raises:
        CheckpointError: a file is missing, damaged, truncated or of another format; it and the tensor are named. Or
            transformers, or the memory, does not allow to load it; their error is the cause.
        ConfigError: `dtype` is no dtype, or the model cannot be put on `device`.
        MissingDependencyError: the folder is of a format that another package reads.
    """
    wanted = _dtype(dtype)
    with converting(CheckpointError, f"{folder} cannot be loaded"):  # files that fit no code, memory that is short
        try:
            model = _opened(folder, wanted)
        except ImportError as error:
            raise MissingDependencyError(f"{folder} cannot be loaded without another package ({error}).") from error
    if device is None:
        return model
    with converting(ConfigError, f"The model cannot be put on the device {device!r}"):
        return model.to(device)


def _opened(folder: str | os.PathLike[str], dtype: torch.dtype | None) -> Any:
    path = Path(folder)
    if path.is_dir():
        is_packed = read_json(path / _CONFIG).get("quantization_config") is not None
    else:
        is_packed = getattr(AutoConfig.from_pretrained(folder), "quantization_config", None) is not None
    if not is_packed:
        return _by_stock(folder, dtype)
    if not path.is_dir():
        path = Path(snapshot_download(str(folder), allow_patterns=["*.json", "*.safetensors"]))
    config = read_json(path / _CONFIG)
    if not isinstance(config.get("quantization_config"), dict):
        raise CheckpointError(f"{path / _CONFIG} is damaged: its quantization_config is no object.")
    return _load(path, config, dtype)


def _by_stock(folder: str | os.PathLike[str], dtype: torch.dtype | None) -> Any:
    """Load a model without packed weights by transformers, which would fill in what is missing."""
    cls: Any = model_class(AutoConfig.from_pretrained(folder))
    options = {} if dtype is None else {"dtype": dtype}
    model, report = cls.from_pretrained(folder, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{folder} lacks the tensor {missing[0]} of a {cls.__name__}; the checkpoint is not complete."
        )
    return model


def _dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    if given is None or given == "auto":
        return None
    found = getattr(torch, given, None) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype is a floating-point dtype of torch or its name; {given!r} was given.")
    return found


def _load(folder: Path, config: Mapping[str, Any], dtype: torch.dtype | None) -> Any:
    description = config["quantization_config"]
    try:
        rules = Rules(description, str(folder / _CONFIG))
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / _CONFIG} is damaged: its quantization_config holds values of a wrong kind ({described(error)})."
        ) from error
    checkpoint = Checkpoint(folder, PUBLIC_STEM if rules.is_public else PRIVATE_STEM)
    checkpoint.check_config(config, without="quantization_config")
    model = _empty_model(folder, dtype)
    if rules.is_public:
        checkpoint.rename(loaded_names(model, checkpoint.files))
    loader = _Loader(model, checkpoint, dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.Embedding, *Anatomy.PRODUCTS)) and (scheme := rules.scheme(name, module)) is not None:
            loader.replace(name, module, scheme)
    for name, schemes in _experts(rules).items():
        loader.replace_experts(name, schemes)
    shared = description.get("shared")
    if description["quant_method"] == PRIVATE_METHOD and isinstance(shared, dict):
        for name, source in shared.items():
            loader.share(name, source)
    loader.fill()
    checkpoint.check_config(config)
    model.hf_quantizer = Seal()
    if model.can_generate() and (folder / "generation_config.json").exists():
        model.generation_config = _generation_config(folder)
    return model.eval()


def _generation_config(folder: Path) -> GenerationConfig:
    path = folder / "generation_config.json"
    read_json(path)
    with converting(CheckpointError, f"{path} describes no generation config"):
        return GenerationConfig.from_pretrained(folder)


def _empty_model(folder: Path, dtype: torch.dtype | None) -> Any:
    # memory of empty weights is reserved and never touched
    with converting(CheckpointError, f"{folder / _CONFIG} does not describe a model"), no_init_weights():
        config = AutoConfig.from_pretrained(folder)
        del config.quantization_config
        config.name_or_path = str(folder)
        cls: Any = model_class(config)
        stored = getattr(config, "dtype", None) or torch.float32
        return cls._from_config(copy.deepcopy(config), dtype=dtype or stored)


def _experts(rules: Rules) -> dict[str, dict[tuple[str, int], Scheme]]:
    """Module of experts -> (product, expert) -> scheme, of the layout that names them one by one."""
    found: dict[str, dict[tuple[str, int], Scheme]] = {}
    for target in () if rules.is_public else rules.targets:
        if match := EXPERT.fullmatch(target):
            scheme = rules.scheme(target, None)
            if scheme is not None:
                found.setdefault(match[1], {})[match[2], int(match[3])] = scheme
    return found


class _Loader:
    """Fills one empty model; keeps account of the tensors it has used."""

    def __init__(self, model: Any, checkpoint: Checkpoint, dtype: torch.dtype | None) -> None:
        self.model, self.checkpoint, self.dtype = model, checkpoint, dtype
        self.used: set[str] = set()

    def replace(self, name: str, module: Any, scheme: Scheme) -> None:
        """Put a packed product or table in the place of the module called `name`."""
        if isinstance(module, nn.Embedding):
            if type(module) is not nn.Embedding or scheme != Scheme(8):
                raise CheckpointError(
                    f"{self.checkpoint.listing}, module {name}: a table of embeddings ({type(module).__name__}) in "
                    f"{scheme} is not served; 8 bits per row of a plain nn.Embedding are. "
                    "Load the folder with AutoModelForCausalLM."
                )
            rows, columns = module.weight.shape
            self._set(name, QuantizedEmbedding(self._packed(name, rows, columns, scheme), module))
            return
        rows, columns = linear_weight(module).shape
        product = QuantizedLinear(self._packed(name, rows, columns, scheme), module.bias, self.model.dtype)
        self._set(name, product)

    def replace_experts(self, name: str, schemes: Mapping[tuple[str, int], Scheme]) -> None:
        """Put packed experts in the place of the module called `name`."""
        modules = dict(self.model.named_modules())
        module: Any = modules.get(name)
        if module is None or not has_known_layout(module):
            raise CheckpointError(f"{self.checkpoint.listing} has packed experts {name}, the model's config has not.")
        lists: list[list[QuantizedLinear]] = []
        for part in ("gate_up_proj", "down_proj"):
            count, rows, columns = getattr(module, part).shape
            absent = [f"{name}.{part}.{index}" for index in range(count) if (part, index) not in schemes]
            if absent:
                raise CheckpointError(f"{self.checkpoint.listing} lacks the packed expert {absent[0]}.")
            lists.append(
                [
                    QuantizedLinear(
                        self._packed(f"{name}.{part}.{index}", rows, columns, schemes[part, index]),
                        None,
                        self.model.dtype,
                    )
                    for index in range(count)
                ]
            )
        gate_up, down = lists
        self._set(name, QuantizedExperts(gate_up, down, module))

    def share(self, name: str, source: str) -> None:
        """Put a table of embeddings that has the codes of the product `source` in the place of `name`."""
        modules = dict(self.model.named_modules())
        table, product = modules.get(name), modules.get(source)
        if type(table) is not nn.Embedding or not isinstance(product, QuantizedLinear):
            raise CheckpointError(
                f"{self.checkpoint.listing}: {name} shares its codes with {source} by the config, but they are no "
                "table of embeddings and packed product."
            )
        self._set(name, QuantizedEmbedding(product.packed, table))

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
        ignorable = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        for name in checkpoint.files.keys() - self.used:
            if name not in tied and not any(re.search(pattern, name) for pattern in ignorable):
                raise checkpoint.damaged(name, "the model that config.json describes has no such tensor")
        _compute_buffers(model)
        model.tie_weights()

    def _unpacked_names(self) -> list[str]:
        packed = {
            f"{name}.{tensor}"
            for name, module in self.model.named_modules()
            if isinstance(module, (QuantizedLinear, QuantizedEmbedding))
            for tensor in OWN_TENSORS
        }
        return [name for name in self.model.state_dict() if name not in packed]

    def _packed(self, name: str, rows: int, columns: int, scheme: Scheme) -> PackedWeight:
        checkpoint = self.checkpoint
        if columns % scheme.columns_per_scale(columns):
            raise checkpoint.damaged(
                f"{name}.weight_packed", f"groups of {scheme.group_size} do not divide its {columns} columns"
            )
        shapes = stored_shapes(scheme, rows, columns)
        tensors = {}
        for suffix in stored_names(scheme):
            kinds: Any = {"weight_scale": (), "weight_shape": ((torch.int64, torch.int32),)}
            dtypes = kinds.get(suffix, ((torch.int32,),))
            tensors[suffix] = checkpoint.tensor(f"{name}.{suffix}", shapes[suffix], *dtypes)
            self.used.add(f"{name}.{suffix}")
        if tensors["weight_shape"].tolist() != [rows, columns]:
            raise checkpoint.damaged(
                f"{name}.weight_shape",
                f"it says {tensors['weight_shape'].tolist()}; the model's config asks for {[rows, columns]}",
            )
        if not bool(tensors["weight_scale"].isfinite().all()):
            raise checkpoint.damaged(f"{name}.weight_scale", "it holds NaN or infinity")
        return PackedWeight.pack(from_tensors(tensors, scheme, rows, columns))

    def _set(self, name: str, module: nn.Module) -> None:
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
