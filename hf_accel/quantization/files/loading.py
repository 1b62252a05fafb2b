"""Loading a model with packed weights: an empty model, packed products in their places, then one tensor at a time.

Every parameter is filled from the files or the load fails; nothing is ever left as it was initialised. Cost: the packed
model and one unpacked weight.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, GenerationConfig
from transformers.initialization import no_init_weights
from transformers.utils.hub import cached_file

from hf_accel.core.failures import converting
from hf_accel.core.model.anatomy import Anatomy
from hf_accel.errors import CheckpointError, ConfigError, MissingDependencyError
from hf_accel.quantization.files.checkpoint import Checkpoint, read_json
from hf_accel.quantization.files.description import BESIDE, CONFIG, find_description, opened
from hf_accel.quantization.files.experts import replace_experts, replace_mxfp4_experts
from hf_accel.quantization.files.filling import Filler
from hf_accel.quantization.files.foreign_experts import replace_foreign_experts
from hf_accel.quantization.files.layout import Description, Layout
from hf_accel.quantization.files.mxfp4 import Mxfp4Description
from hf_accel.quantization.files.rebuilding import EXPERT, loaded_names, model_class
from hf_accel.quantization.files.rules import Rules
from hf_accel.quantization.files.saving import PRIVATE_STEM, PUBLIC_STEM
from hf_accel.quantization.files.seal import Seal
from hf_accel.quantization.modules.experts import known_layout

# of a model on the hub; not what lies beside it in the format of whoever trained it: the same weights a second time
FETCHED: dict[str, Any] = {"allow_patterns": ["*.json", "*.safetensors"], "ignore_patterns": ["*/*", "consolidated*"]}


def from_pretrained(
    folder: str | os.PathLike[str], dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> Any:
    """Load a model that `save_pretrained` wrote, with packed weights or without, in evaluation mode.

    Reads weights of 2, 3, 4 and 8 bits that other programs wrote, without their packages: compressed-tensors
    (`pack-quantized`), GPTQ of both versions, AutoRound and AWQ; and experts in MXFP4, as gpt-oss has them, bit by bit.
    The model is of the class that was saved. A folder without packed weights is loaded by transformers.

    Args:
        folder: a local folder, or the name of a model on the hub.
        dtype: of everything that is not packed; None: as stored.
        device: where the model is put; None: the CPU.

    Raises:
        CheckpointError: a file is missing, damaged, truncated or of another format; it and the tensor are named. Or
            transformers, or the memory, does not allow to load it; their error is the cause.
        ConfigError: `dtype` is not a floating-point dtype, or the model cannot be put on `device`.
        MissingDependencyError: the folder is of a format that another package reads.
    """
    wanted = dtype_of(dtype)
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
    if not path.is_dir():
        if getattr(AutoConfig.from_pretrained(folder), "quantization_config", None) is None and not _is_beside(folder):
            return _by_stock(folder, dtype)
        path = Path(snapshot_download(str(folder), **FETCHED))
    config = read_json(path / CONFIG)
    description = find_description(path, config)
    return _by_stock(folder, dtype) if description is None else _load(path, config, description, dtype)


def _is_beside(name: str | os.PathLike[str]) -> bool:
    """Return whether a model on the hub has a description of packed weights that is not in its config."""
    quiet = {f"_raise_exceptions_for_{kind}": False for kind in ("missing_entries", "connection_errors", "gated_repo")}
    return any(cached_file(name, file, **quiet) for file in BESIDE)  # type: ignore[arg-type]


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


def dtype_of(given: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype that was named, None for the stored one.

    Raises:
        ConfigError: it is not a floating-point dtype.
    """
    if given is None or given == "auto":
        return None
    found = getattr(torch, given, None) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype is a floating-point dtype of torch or its name; {given!r} was given.")
    return found


def _load(folder: Path, config: Mapping[str, Any], description: Mapping[str, Any], dtype: torch.dtype | None) -> Any:
    rules = opened(description, str(folder / CONFIG))
    checkpoint = Checkpoint(folder, stem_of(folder) if rules.is_public else PRIVATE_STEM)
    checkpoint.check_config(config, without="quantization_config")
    model = _empty_model(folder, dtype)
    if rules.is_public:
        checkpoint.rename(loaded_names(model, checkpoint.files))
    filler = Filler(model, checkpoint, dtype)
    for name, module in list(model.named_modules()):
        if rules.is_public and (stacked := known_layout(module)) is not None:
            replace_foreign_experts(filler, name, module, stacked, rules)
        if isinstance(rules, Mxfp4Description) and rules.holds(name, checkpoint):
            replace_mxfp4_experts(filler, name, module)
        if not isinstance(module, (nn.Embedding, *Anatomy.PRODUCTS)):
            continue
        if (layout := rules.layout(name, module, checkpoint)) is not None:
            filler.replace(name, module, layout)
    for name, layouts in _experts(rules).items():
        replace_experts(filler, name, layouts)
    shared = description.get("shared")
    if not rules.is_public and isinstance(shared, dict):
        for name, source in shared.items():
            filler.share(name, source)
    filler.fill()
    checkpoint.check_config(config)
    model.hf_quantizer = Seal()
    if model.can_generate() and (folder / "generation_config.json").exists():
        model.generation_config = generation_config(folder)
    return model.eval()


def generation_config(folder: Path) -> GenerationConfig:
    """Return the generation config of a folder.

    Raises:
        CheckpointError: its file is damaged.
    """
    path = folder / "generation_config.json"
    read_json(path)
    with converting(CheckpointError, f"{path} describes no generation config"):
        return GenerationConfig.from_pretrained(folder)


def _empty_model(folder: Path, dtype: torch.dtype | None) -> Any:
    # weights that are not initialised take no memory: the system gives pages to what is written
    with converting(CheckpointError, f"{folder / CONFIG} does not describe a model"), no_init_weights():
        config = AutoConfig.from_pretrained(folder)
        vars(config).pop("quantization_config", None)
        config.name_or_path = str(folder)
        cls: Any = model_class(config)
        stored = getattr(config, "dtype", None) or torch.float32
        return cls._from_config(copy.deepcopy(config), dtype=dtype or stored)


def stem_of(folder: Path) -> str:
    """Return what the names of the files with weights start with: AutoGPTQ once named them after bits and groups."""
    if any((folder / f"{PUBLIC_STEM}.safetensors{end}").exists() for end in ("", ".index.json")):
        return PUBLIC_STEM
    single = list(folder.glob("*.safetensors"))
    return single[0].stem if len(single) == 1 else PUBLIC_STEM


def _experts(rules: Description) -> dict[str, dict[tuple[str, int], Layout]]:
    """Return module of experts -> (product, expert) -> layout, where the description names experts one by one."""
    found: dict[str, dict[tuple[str, int], Layout]] = {}
    if not isinstance(rules, Rules) or rules.is_public:
        return found
    for target in rules.targets:
        if match := EXPERT.fullmatch(target):
            layout = rules.layout(target, None)
            if layout is not None:
                found.setdefault(match[1], {})[match[2], int(match[3])] = layout
    return found
