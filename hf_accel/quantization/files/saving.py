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
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor

from hf_accel.core.failures import converting
from hf_accel.errors import CheckpointError, ConfigError, UnsupportedModelError
from hf_accel.quantization.files.checkpoint import read_json
from hf_accel.quantization.files.description import BESIDE
from hf_accel.quantization.files.encoding import ENCODINGS, GptqEncoding
from hf_accel.quantization.files.formats import METHOD
from hf_accel.quantization.files.integrity import KEY, digest, order_metadata, stamp
from hf_accel.quantization.files.inventory import Inventory, take_inventory
from hf_accel.quantization.files.mxfp4 import MXFP4
from hf_accel.quantization.files.mxfp4_encoding import Mxfp4Encoding

PUBLIC_STEM, PRIVATE_STEM = "model", "hf_accel"
_CONFIG = "config.json"
_BESIDE = ".hf_accel.part"  # where a save is written before it is complete
# weights that stock code would load in place of ours, were they left in the folder of a private layout
_FOREIGN = re.compile(r"(pytorch_model.*\.bin(\.index\.json)?|tf_model.*\.h5|flax_model.*\.msgpack|.*\.gguf)")
_OWN = re.compile(
    rf"({PUBLIC_STEM}|{PRIVATE_STEM})(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?|"
    + "|".join(map(re.escape, BESIDE))
)
QUANTIZED = (None, METHOD, *ENCODINGS)  # for what configs quantize
FORMATS = (*QUANTIZED, MXFP4)


class _Entry(NamedTuple):
    nbytes: int
    make: Callable[[], Tensor]


class Encoding(Protocol):
    """How the weights of an inventory are written.

    packed: names of what is packed; plain: name -> tensor stored as it is; files: name -> content of files beside the
    config; tensors: full name -> tensor of something packed; sizes: suffix -> bytes of the same.
    """

    @property
    def packed(self) -> Iterable[str]: ...

    @property
    def plain(self) -> Mapping[str, Tensor]: ...

    @property
    def files(self) -> Mapping[str, Mapping[str, Any]]: ...

    def tensors(self, name: str) -> dict[str, Tensor]: ...

    def sizes(self, name: str) -> dict[str, int]: ...


def write(model: Any, folder: Path, max_shard_size: int | str, format: str | None = None) -> None:
    """Save a model with packed weights into `folder`; weights of an earlier save are replaced.

    format: one of `FORMATS`; None: compressed-tensors where that can hold the model, else a layout of our own.

    Raises:
        UnsupportedModelError: parts of the model, as those of an adapter, cannot be saved with packed weights.
        CheckpointError: the folder holds weights that stock code would take for those of this model, or is a file, or
            cannot be written.
        ConfigError: `max_shard_size` is not a size, or `format` is none.
    """
    if format not in FORMATS:
        known = ", ".join(repr(name) for name in FORMATS if name)
        raise ConfigError(f"A model is saved in one of the formats {known}, or None; {format!r} was given.")
    found = take_inventory(model)
    encoding: Encoding = found
    if format == MXFP4:
        mxfp4 = Mxfp4Encoding(model, found)
        encoding, found.saved_config.quantization_config = mxfp4, mxfp4.config()
    elif format is not None:
        if reason := found.private_reason if format == METHOD else found.misfit:
            raise UnsupportedModelError(
                f"The packed weights of this {type(model).__name__} do not fit the format {format!r} ({reason}). Save "
                "with format=None, or quantize with embeddings=None and what is named left as it is."
            )
        if format != METHOD:
            encoding = GptqEncoding(found, type(model).__name__, format)
            found.saved_config.quantization_config = encoding.config()
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a model is saved into a folder. Name another place.")
    beside = folder / _BESIDE
    try:
        with converting(CheckpointError, f"{folder} cannot be written", "Name another place, or free memory."):
            folder.mkdir(parents=True, exist_ok=True)
            if _stem(found, encoding) == PRIVATE_STEM:
                _refuse_foreign(folder)
            shutil.rmtree(beside, ignore_errors=True)  # of a save that was interrupted
            beside.mkdir()
            _write_all(model, found, encoding, beside, max_shard_size)
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


def _stem(found: Inventory, encoding: Encoding) -> str:
    return PRIVATE_STEM if encoding is found and not found.is_public else PUBLIC_STEM


def _write_all(model: Any, found: Inventory, encoding: Encoding, folder: Path, max_shard_size: int | str) -> None:
    found.saved_config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    config = read_json(folder / _CONFIG)
    digests: dict[str, str] = {}
    stem = _stem(found, encoding)
    for file, content in encoding.files.items():
        (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    entries = _entries(encoding)
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


def _entries(encoding: Encoding) -> dict[str, _Entry]:
    """Return name -> size and maker of every tensor to write; the tensors of one packed weight follow one another."""
    entries = {name: _Entry(t.numel() * t.element_size(), partial(t.detach)) for name, t in encoding.plain.items()}
    latest: dict[str, dict[str, Tensor]] = {}

    def make(name: str, suffix: str) -> Tensor:
        if name not in latest:
            latest.clear()
            latest[name] = encoding.tensors(name)
        return latest[name][f"{name}.{suffix}"]

    for name in encoding.packed:
        for suffix, nbytes in encoding.sizes(name).items():
            entries[f"{name}.{suffix}"] = _Entry(nbytes, partial(make, name, suffix))
    return entries
