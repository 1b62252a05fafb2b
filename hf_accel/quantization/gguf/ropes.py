"""Rotary frequencies of GGUF files: their base, linear scaling, and factors per frequency as tensors.

`rope_freqs.weight` [n] divides frequencies: Llama 3's scaling is stored so, computed. `rope_factors_short.weight` and
`rope_factors_long.weight` are the factors of longrope. Other scalings (yarn) are refused: nothing here would compute
them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_accel.errors import UnsupportedModelError
from hf_accel.quantization.gguf.reader import Header
from hf_accel.quantization.gguf.types import DENSE, dense

FACTORS = "rope_freqs.weight"
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"
_DEFAULT_BASE = 10000.0
_LLAMA3: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_WITH_YARN = ("gpt-oss",)
_YARN: dict[str, Any] = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}  # gpt-oss', and llama.cpp's own
_WITH_FACTORS = ("llama",)  # architectures for which llama.cpp reads `rope_freqs.weight`


def read(file: Header, prefix: str, head_dim: int, length: int) -> dict[str, Any]:
    """Return transformers' `rope_parameters` of a file.

    Raises:
        CheckpointError: they are of a kind that is not known.
    """
    metadata = file.metadata
    base = float(str(np.float32(metadata.get(f"{prefix}.rope.freq_base", _DEFAULT_BASE))))
    turned = metadata.get(f"{prefix}.rope.dimension_count", head_dim)
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    if turned != head_dim:
        found["partial_rotary_factor"] = turned / head_dim
    kind = metadata.get(f"{prefix}.rope.scaling.type", "none")
    original = metadata.get(f"{prefix}.rope.scaling.original_context_length", length)
    if LONG in file.tensors and SHORT in file.tensors:
        found |= {
            "rope_type": "longrope",
            "short_factor": _values(file, SHORT).tolist(),
            "long_factor": _values(file, LONG).tolist(),
            "original_max_position_embeddings": original,
            "attention_factor": metadata.get(f"{prefix}.rope.scaling.attn_factor", 1.0),
        }
    elif FACTORS in file.tensors:
        found |= _of_factors(_values(file, FACTORS), base, turned, length)
    elif kind == "linear":
        found |= {"rope_type": "linear", "factor": float(file[f"{prefix}.rope.scaling.factor"])}
    elif kind == "yarn" and prefix in _WITH_YARN:
        factor = float(file[f"{prefix}.rope.scaling.factor"])
        found |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **_YARN}
    elif kind != "none":
        raise file.damaged(
            f"its rotary embeddings are scaled by {kind!r}; none, linear and factors as tensors are known"
        )
    return found


def written(config: Any, name: str) -> dict[str, Any]:
    """Return the keys of metadata, without the architecture's prefix, for a config's rotary embeddings.

    Raises:
        UnsupportedModelError: files of the architecture called `name` cannot say what they are.
    """
    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    turned = int(size * parameters.get("partial_rotary_factor", 1.0))
    found = {"rope.freq_base": parameters["rope_theta"], "rope.dimension_count": turned}
    if kind == "linear":
        return found | {"rope.scaling.type": "linear", "rope.scaling.factor": parameters["factor"]}
    if kind == "default" or (kind == "llama3" and name in _WITH_FACTORS):
        return found
    raise UnsupportedModelError(
        f"Rotary embeddings of the type {kind!r} are not written to GGUF files of the architecture {name}; default and "
        "linear ones are, and llama3 for llama."
    )


def factors(config: Any) -> Tensor | None:
    """Return what frequencies are divided by, fp32 [n], of a config whose type is llama3; None of any other."""
    if config.rope_parameters.get("rope_type") != "llama3":
        return None
    plain = config.rope_parameters["rope_theta"] ** (torch.arange(0, _turned(config), 2).float() / _turned(config))
    frequencies = ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))[0]
    return 1.0 / (plain * frequencies)


def _turned(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _of_factors(found: Tensor, base: float, turned: int, length: int) -> dict[str, Any]:
    """Return the parameters of llama3's scaling that gives these factors, or of longrope with them for every length."""
    frequencies = base ** -(torch.arange(0, turned, 2).float() / turned)
    low, high, original = _LLAMA3.values()
    factor = float(found.max())
    rounds = original * frequencies / (2 * torch.pi)
    smooth = ((rounds - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if torch.allclose(expected, found, rtol=1e-4):
        return {"rope_type": "llama3", "factor": float(round(factor, 3)), **_LLAMA3}
    every = found.tolist()
    return {
        "rope_type": "longrope", "short_factor": every, "long_factor": every,
        "original_max_position_embeddings": length, "attention_factor": 1.0,
    }  # fmt: skip


def _values(file: Header, name: str) -> Tensor:
    entry = file.tensors[name]
    if entry.type not in DENSE:
        raise file.damaged(f"the tensor {name} is of type {entry.type}; its values are expected as they are")
    return dense(entry, file.blocks(entry)).float()
