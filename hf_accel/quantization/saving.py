"""Saving a model with packed weights: config, generation config, and safetensors in shards, written one at a time.

A file is written beside its place and moved there when it is complete, so a folder the model was loaded from can be
saved into. Cost: one shard in memory, 5 GB unless asked otherwise.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor

from hf_accel.errors import CheckpointError
from hf_accel.kernels.packed import PackedWeight
from hf_accel.quantization.formats import stored_shapes
from hf_accel.quantization.inventory import Inventory, take_inventory

PUBLIC_STEM, PRIVATE_STEM = "model", "hf_accel"
# weights that stock code would load in place of ours, were they left in the folder of a private layout
_FOREIGN = re.compile(r"(pytorch_model.*\.bin(\.index\.json)?|tf_model.*\.h5|flax_model.*\.msgpack|.*\.gguf)")
_OWN = re.compile(rf"({PUBLIC_STEM}|{PRIVATE_STEM})(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?")


class _Entry(NamedTuple):
    nbytes: int
    make: Callable[[], Tensor]


def write(model: Any, folder: Path, max_shard_size: int | str) -> None:
    """Save a model with packed weights into `folder`; weights of an earlier save are replaced.

    Raises:
        UnsupportedModelError: parts of the model, as those of an adapter, cannot be saved with packed weights.
        CheckpointError: the folder holds weights that stock code would take for those of this model, or is a file.
    """
    found = take_inventory(model)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a model is saved into a folder. Name another place.")
    folder.mkdir(parents=True, exist_ok=True)
    if not found.is_public:
        foreign = sorted(path.name for path in folder.iterdir() if _FOREIGN.fullmatch(path.name))
        if foreign:
            raise CheckpointError(
                f"{folder} holds {', '.join(foreign)}, which stock code would load in place of this model's weights. "
                "Save into an empty folder."
            )
    stem = PUBLIC_STEM if found.is_public else PRIVATE_STEM
    entries = _entries(found)
    split = split_state_dict_into_shards_factory(
        entries,  # type: ignore[arg-type]
        get_storage_size=lambda entry: entry.nbytes,  # type: ignore[attr-defined]
        get_storage_id=lambda entry: None,
        filename_pattern=stem + "{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    written = set(split.filename_to_tensors)
    for file, names in split.filename_to_tensors.items():
        shard = {name: entries[name].make().contiguous() for name in names}
        _replace(folder / file, partial(save_file, shard, metadata={"format": "pt"}))
        del shard
    if split.is_sharded:
        index = {
            "metadata": {"total_size": sum(entry.nbytes for entry in entries.values())},
            "weight_map": split.tensor_to_filename,
        }
        file = f"{stem}.safetensors.index.json"
        _replace(folder / file, lambda path: path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n"))
        written.add(file)
    for path in folder.iterdir():
        if _OWN.fullmatch(path.name) and path.name not in written:
            path.unlink()  # of an earlier save
    _config(model, found).save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _entries(found: Inventory) -> dict[str, _Entry]:
    """Name -> size and maker of every tensor to write; the tensors of one packed weight follow one another."""
    entries = {name: _Entry(t.numel() * t.element_size(), partial(t.detach)) for name, t in found.plain.items()}
    latest: dict[str, dict[str, Tensor]] = {}

    def make(name: str, suffix: str) -> Tensor:
        if name not in latest:
            latest.clear()
            latest[name] = found.tensors(name)
        return latest[name][f"{name}.{suffix}"]

    for name, weight in found.packed.items():
        for suffix, nbytes in _sizes(weight, found).items():
            entries[f"{name}.{suffix}"] = _Entry(nbytes, partial(make, name, suffix))
    return entries


def _sizes(weight: PackedWeight, found: Inventory) -> dict[str, int]:
    width = {"weight_packed": 4, "weight_scale": found.dtype.itemsize, "weight_shape": 8, "weight_zero_point": 4}
    shapes = stored_shapes(weight.scheme, weight.rows, weight.columns)
    return {name: shape[0] * (shape[1] if len(shape) > 1 else 1) * width[name] for name, shape in shapes.items()}


def _config(model: Any, found: Inventory) -> Any:
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


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    beside = path.with_name(f".{path.name}.part")
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
