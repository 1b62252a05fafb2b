"""Saving a model with packed weights: config, generation config, and safetensors in shards, written one at a time.

All is written beside its place and moved there when it is complete, so a folder the model was loaded from can be saved
into. While files are moved there is no config, and without one no loader takes the folder for a model; an interrupted
save leaves the earlier one or that. Cost: one shard in memory, 5 GB unless asked otherwise, and checksums.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor

from hf_accel.core.failures import converting
from hf_accel.errors import CheckpointError, ConfigError
from hf_accel.kernels.weights import PackedWeight
from hf_accel.quantization.files.checkpoint import read_json
from hf_accel.quantization.files.formats import stored_shapes
from hf_accel.quantization.files.integrity import KEY, digest, order_metadata, stamp
from hf_accel.quantization.files.inventory import Inventory, take_inventory

PUBLIC_STEM, PRIVATE_STEM = "model", "hf_accel"
_CONFIG = "config.json"
_BESIDE = ".hf_accel.part"  # where a save is written before it is complete
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
        CheckpointError: the folder holds weights that stock code would take for those of this model, or is a file, or
            cannot be written.
        ConfigError: `max_shard_size` is not a size.
    """
    found = take_inventory(model)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a model is saved into a folder. Name another place.")
    beside = folder / _BESIDE
    try:
        with converting(CheckpointError, f"{folder} cannot be written", "Name another place, or free memory."):
            folder.mkdir(parents=True, exist_ok=True)
            if not found.is_public:
                _refuse_foreign(folder)
            shutil.rmtree(beside, ignore_errors=True)  # of a save that was interrupted
            beside.mkdir()
            _write_all(model, found, beside, max_shard_size)
            _move_all(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _refuse_foreign(folder: Path) -> None:
    foreign = sorted(path.name for path in folder.iterdir() if _FOREIGN.fullmatch(path.name))
    if foreign:
        raise CheckpointError(
            f"{folder} holds {', '.join(foreign)}, which stock code would load in place of this model's weights. "
            "Save into an empty folder."
        )


def _write_all(model: Any, found: Inventory, folder: Path, max_shard_size: int | str) -> None:
    found.saved_config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    config = read_json(folder / _CONFIG)
    digests: dict[str, str] = {}
    stem = PUBLIC_STEM if found.is_public else PRIVATE_STEM
    entries = _entries(found)
    try:
        split = split_state_dict_into_shards_factory(
            entries,  # type: ignore[arg-type]
            get_storage_size=lambda entry: entry.nbytes,  # type: ignore[attr-defined]
            get_storage_id=lambda entry: None,
            filename_pattern=stem + "{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"max_shard_size is a number of bytes or a text as '5GB'; {max_shard_size!r} was given."
        ) from error
    for file, names in split.filename_to_tensors.items():
        shard = unshared({name: entries[name].make() for name in names})
        metadata = stamp(config, shard)
        save_file(shard, folder / file, metadata=metadata)
        order_metadata(folder / file)
        digests[file] = digest(metadata)
        del shard
    if split.is_sharded:
        index = {
            "metadata": {"total_size": sum(entry.nbytes for entry in entries.values()), KEY: digests},
            "weight_map": split.tensor_to_filename,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def _move_all(source: Path, folder: Path) -> None:
    """Move all files of a save into their place, the config last, and delete weights of an earlier save."""
    (folder / _CONFIG).unlink(missing_ok=True)
    written = {path.name for path in source.iterdir()}
    for path in folder.iterdir():
        if _OWN.fullmatch(path.name) and path.name not in written:
            path.unlink()
    for name in sorted(written, key=lambda name: name == _CONFIG):
        os.replace(source / name, folder / name)


def unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, contiguous, with copies of those that share memory: a file holds each by itself."""
    places: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in places else tensor
        places.add(place)
    return found


def _entries(found: Inventory) -> dict[str, _Entry]:
    """Return name -> size and maker of every tensor to write; the tensors of one packed weight follow one another."""
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
