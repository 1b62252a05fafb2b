"""Whether the metadata of a file say of a model what its config does, found by reading them before they are written."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from hf_accel.quantization.gguf.architectures import WINDOWED, Architecture, config_of
from hf_accel.quantization.gguf.reader import Entry, Header

# attributes of a config that say nothing of what is computed from ids, or that tensors say
_FREE = frozenset(
    [
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "_name_or_path",
        "name_or_path",
        "model_type",
        "initializer_range",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "pretraining_tp",
        "vocab_size",
        "tie_word_embeddings",
        "quantization_config",
        "attention_dropout",
        "resid_pdrop",
        "embd_pdrop",
        "max_window_layers",
        "use_sliding_window",
        "max_position_embeddings",
        "original_max_position_embeddings",
    ]
)
_BY_TENSORS = ("llama3",)  # rotary embeddings whose factors are a tensor, made of the config


def differences(config: Any, row: Architecture, metadata: dict[str, Any], stored: Iterable[str], rows: int) -> str:
    """Return the first thing in which the config that a reader makes of a file differs from `config`, or "".

    metadata: keys without the architecture's prefix; stored: names of tensors; rows: of the table of embeddings.
    """
    tensors = {name: Entry(name, (rows, config.hidden_size), "F32", 0, 0) for name in stored}
    described = {f"{row.name}.{key}": value for key, value in metadata.items()} | {"general.architecture": row.name}
    return disagreement(config, config_of(Header(Path(), described, tensors), row), row)


def disagreement(config: Any, other: Any, row: Architecture) -> str:
    """Return the first thing that counts in which a config differs from what a reader makes of a file, or ""."""
    found, mine = other.to_dict(), config.to_dict()
    free = _FREE if row.name in WINDOWED else _FREE | {"sliding_window"}
    for name in sorted((mine.keys() & found.keys()) - free):
        if name == "rope_parameters" and mine[name].get("rope_type") in _BY_TENSORS:
            continue
        if mine[name] is not None and not _is_equal(mine[name], found[name]):
            return f"{name} = {mine[name]!r} (a reader takes it for {found[name]!r})"
    return ""


def _is_equal(mine: Any, found: Any) -> bool:
    if isinstance(mine, dict) and isinstance(found, dict):
        names = (mine.keys() | found.keys()) - {"partial_rotary_factor"}
        whole = (mine.get("partial_rotary_factor") or 1.0) == (found.get("partial_rotary_factor") or 1.0)
        return whole and all(_is_equal(mine.get(name), found.get(name)) for name in names)
    if isinstance(mine, float) or isinstance(found, float):
        return mine is not None and found is not None and np.float32(mine) == np.float32(found)
    return bool(mine == found)
