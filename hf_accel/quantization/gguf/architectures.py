"""What GGUF files call the architectures that are read and written here, their sizes, and how their tensors differ.

A row of `ARCHITECTURES` says all of it in both directions; names of tensors are the gguf package's. Sources of what
llama.cpp does with a value: src/llama-model.cpp and conversion/ of llama.cpp. An architecture that has no row is read
by stock transformers, expanded. Rotary frequencies are those of `ropes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from hf_accel.errors import UnsupportedModelError
from hf_accel.quantization.gguf import ropes
from hf_accel.quantization.gguf.package import gguf_package
from hf_accel.quantization.gguf.reader import Header

Pairs = tuple[tuple[str, str], ...]
_COMMON: Pairs = (
    ("context_length", "max_position_embeddings"),
    ("block_count", "num_hidden_layers"),
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
)
_HEADS_GEMMA2_27B = 46  # its number of layers, by which llama.cpp knows it


@dataclass(frozen=True)
class Architecture:
    """One architecture of GGUF files.

    name: in files; model_type: in transformers; also: model types that are written as this one; permuted: rows of q
    and k lie in another order within a head; norm_offset: what stored norms have more; pairs: further keys of metadata
    and attributes of the config that they hold; fixed: what the architecture says without a key; is_tied: the head
    always is the table of embeddings; flags: an attribute of the config, and the tensor by whose presence it is known;
    has_experts: it is read, and not written.
    """

    name: str
    model_type: str
    also: tuple[str, ...] = ()
    permuted: bool = False
    norm_offset: float = 0.0
    pairs: Pairs = ()
    fixed: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: {}
    is_tied: bool = False
    flags: Pairs = ()
    has_experts: bool = False


def _gemma2_scale(values: dict[str, Any]) -> dict[str, Any]:
    """Return what llama.cpp divides scores by: the width of a head, but for the 27B model, which has another."""
    is_largest = values["num_hidden_layers"] == _HEADS_GEMMA2_27B
    heads = values["hidden_size"] // values["num_attention_heads"]
    return {"query_pre_attn_scalar": heads if is_largest else values["head_dim"]}


ARCHITECTURES = (
    Architecture(
        "llama",
        "llama",
        ("mistral",),
        permuted=True,
        flags=(("attention_bias", "blk.0.attn_q.bias"), ("mlp_bias", "blk.0.ffn_up.bias")),
    ),
    Architecture("qwen2", "qwen2"),
    Architecture("qwen3", "qwen3", flags=(("attention_bias", "blk.0.attn_q.bias"),)),
    Architecture("gemma", "gemma", norm_offset=1.0, is_tied=True),
    Architecture(
        "gemma2",
        "gemma2",
        norm_offset=1.0,
        pairs=(
            ("attn_logit_softcapping", "attn_logit_softcapping"),
            ("final_logit_softcapping", "final_logit_softcapping"),
            ("attention.sliding_window", "sliding_window"),
        ),
        fixed=_gemma2_scale,
        is_tied=True,
    ),
    Architecture(
        "qwen3moe",
        "qwen3_moe",
        pairs=(
            ("expert_count", "num_experts"),
            ("expert_used_count", "num_experts_per_tok"),
            ("expert_feed_forward_length", "moe_intermediate_size"),
        ),
        fixed=lambda values: {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        flags=(("attention_bias", "blk.0.attn_q.bias"),),
        has_experts=True,
    ),
    Architecture(
        "gpt-oss",
        "gpt_oss",
        pairs=(
            ("expert_count", "num_local_experts"),
            ("expert_used_count", "num_experts_per_tok"),
            ("expert_feed_forward_length", "intermediate_size"),
            ("attention.sliding_window", "sliding_window"),
        ),
        has_experts=True,
    ),
    Architecture("phi3", "phi3", pairs=(("attention.sliding_window", "sliding_window"),)),
)
_READ = {row.name: row for row in ARCHITECTURES}
_WRITTEN = {kind: row for row in ARCHITECTURES if not row.has_experts for kind in (row.model_type, *row.also)}
WINDOWED = ("gemma2",)  # architectures whose windows llama.cpp has; it reads those of phi3 and leaves them out
_SUFFIXES = ("weight", "bias")  # of tensors; others are an adapter's
_NO_HEAD_DIM = ("qwen2", "phi3")  # configs that have the width of a head from others


def read_as(name: str) -> Architecture | None:
    """Return the architecture that files call `name`, None for one that has no row."""
    return _READ.get(name)


def written_as(model_type: str) -> Architecture | None:
    """Return the architecture as which models of this type are written, None for one that has no row."""
    return _WRITTEN.get(model_type)


def config_of(file: Header, row: Architecture) -> Any:
    """Return the transformers config that a file describes.

    Raises:
        CheckpointError: a value is missing, or the file asks for rotary frequencies that are not known.
    """
    metadata, prefix = file.metadata, f"{row.name}."
    if row.has_experts:
        metadata.setdefault(f"{prefix}feed_forward_length", file[f"{prefix}expert_feed_forward_length"])
    values = {attribute: _plain(file[prefix + key]) for key, attribute in _COMMON if key != "attention.head_count_kv"}
    values["num_key_value_heads"] = metadata.get(f"{prefix}attention.head_count_kv", values["num_attention_heads"])
    per_layer = [attribute for attribute, value in values.items() if isinstance(value, list)]
    if per_layer:
        raise file.damaged(f"its layers have {per_layer[0]} of their own each, which {row.model_type} models do not")
    width = values["hidden_size"] // values["num_attention_heads"]
    values["head_dim"] = metadata.get(f"{prefix}attention.key_length", width)
    if metadata.get(f"{prefix}attention.value_length", values["head_dim"]) != values["head_dim"]:
        raise file.damaged("its values are of another width than its keys, which no model here has")
    values |= {attribute: _plain(metadata[prefix + key]) for key, attribute in row.pairs if prefix + key in metadata}
    values |= row.fixed(values)
    values |= {attribute: tensor in file.tensors for attribute, tensor in row.flags}
    values["rope_parameters"] = ropes.read(file, row.name, values["head_dim"], values["max_position_embeddings"])
    if (original := values["rope_parameters"].get("original_max_position_embeddings")) and row.name == "phi3":
        values["original_max_position_embeddings"] = original
    if row.name in _NO_HEAD_DIM and values.pop("head_dim") != width:
        raise file.damaged(f"the width of a head is not {width}, as it is in every {row.model_type}")
    for kind in ("bos", "eos"):
        values[f"{kind}_token_id"] = metadata.get(f"tokenizer.ggml.{kind}_token_id")
    values["pad_token_id"] = metadata.get("tokenizer.ggml.padding_token_id")
    if "token_embd.weight" not in file.tensors:
        raise file.damaged("it lacks the tensor token_embd.weight")
    values["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    values["tie_word_embeddings"] = row.is_tied or "output.weight" not in file.tensors
    return AutoConfig.for_model(row.model_type, **values)


def metadata_of(config: Any, row: Architecture) -> dict[str, Any]:
    """Return the keys of metadata, without the architecture's prefix, and values that describe a config.

    Raises:
        UnsupportedModelError: llama.cpp has no such rotary frequencies.
    """
    found = {key: getattr(config, attribute) for key, attribute in (*_COMMON, *row.pairs)}
    found["attention.key_length"] = found["attention.value_length"] = head_dim(config)
    if (window := getattr(config, "sliding_window", None)) and row.name not in WINDOWED:
        # llama.cpp looks at everything: up to the length of a window there is none to be missed
        found["context_length"] = min(window, found["context_length"])
    return {key: value for key, value in found.items() if value is not None} | ropes.written(config, row.name)


def head_dim(config: Any) -> int:
    """Return the width of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def names(row: Architecture, layers: int, state: Iterable[str]) -> dict[str, str]:
    """Return name in a model -> name in a file of tensors of a model's state."""
    package = gguf_package()
    kind = next(kind for kind, name in package.MODEL_ARCH_NAMES.items() if name == row.name)
    table = package.get_tensor_name_map(kind, layers)
    found = {}
    for name in state:
        stem, _, suffix = name.rpartition(".")
        if row.has_experts and name.rpartition(".")[0].endswith(".experts"):
            continue  # three tensors for all of a layer, which `experts` reads
        stored = table.get_name(stem) if suffix in _SUFFIXES else None
        if stored is None and (whole := table.get_name(name)) is not None:  # a tensor that is a module's own
            stored, suffix = whole, "weight"
        if stored is None and stem == "lm_head" and row.is_tied:
            continue
        if stored is None:
            raise UnsupportedModelError(
                f"GGUF files of the architecture {row.name} have no name for the tensor {name}."
            )
        found[name] = f"{stored}.{suffix}"
    return found


def row_order(row: Architecture, name: str, config: Any) -> Tensor | None:
    """Return the row of the stored tensor that each row of the model's is, int64; None: the same.

    name: in a file. llama.cpp turns adjacent columns of a head, transformers column i with i + half.
    """
    if not row.permuted or (".attn_q." not in name and ".attn_k." not in name):
        return None
    heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
    size = head_dim(config)
    return torch.arange(heads * size).view(heads, size // 2, 2).transpose(1, 2).flatten()


def is_norm(name: str) -> bool:
    """Return whether a tensor, by its name in a file, is the weight of a norm."""
    return name.endswith("norm.weight")


def _plain(value: Any) -> Any:
    """Return a number as a config writes it: of one in fp32 the shortest decimal is what was meant."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
