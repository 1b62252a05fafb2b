"""The same function at the cost of a larger model: a small trained Llama padded with weights that change nothing.

Trained models are small where measurements must be quick, and a large model with random weights writes nothing worth
measuring: speculative decoding accepts none of its tokens. A widened model has both, the text of the small one and
the memory traffic and arithmetic of a large one. Added features, heads and inner units are zeros, added layers have
random weights before outputs of zero.

The padded weights are as many bytes to read as any others, and are written once: Linux backs pages that were never
written with one shared page, which caches would answer. Building costs the memory of the wide model alone, and the
time of giving it random weights first. Zeros are as slow as other numbers, unless somebody skips or compresses them;
the vocabulary stays, so the head costs what it did per feature.

In exact arithmetic the function is the same. In floating point norms round differently, as they divide by the root of
another number of features: in half precision near-ties of the small model may fall to the other side.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_accel.errors import ConfigError, UnsupportedModelError

# Llama-3.2-1B without its large vocabulary, for models with heads of 32 features
LLAMA_1B_COST: dict[str, int] = dict(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=64
)

KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SEED = 0
STANDARD_DEVIATION = 0.02  # of the weights of added layers

# what the rows and columns of each weight are; a bias has its weight's rows
AXES: dict[str, tuple[str, ...]] = {
    "embed_tokens": ("vocabulary", "hidden"),
    "q_proj": ("query", "hidden"),
    "k_proj": ("key", "hidden"),
    "v_proj": ("key", "hidden"),
    "o_proj": ("hidden", "query"),
    "gate_proj": ("inner", "hidden"),
    "up_proj": ("inner", "hidden"),
    "down_proj": ("hidden", "inner"),
    "input_layernorm": ("hidden",),
    "post_attention_layernorm": ("hidden",),
    "norm": ("hidden",),
    "lm_head": ("vocabulary", "hidden"),
}
OUTPUTS = ("o_proj", "down_proj")  # what a layer adds to the hidden states

Places = dict[str, tuple[Tensor, Tensor]]  # by axis: indices in the original, and where they lie in the wide model


def widen(model: PreTrainedModel, shape: Mapping[str, int], dtype: torch.dtype) -> PreTrainedModel:
    """Return a new Llama model of a larger shape that computes what `model` computes; `model` is left as it is.

    Args:
        model: a Llama causal language model, not optimised; of any floating dtype.
        shape: any of `hidden_size`, `intermediate_size`, `num_hidden_layers`, `num_attention_heads` and
            `num_key_value_heads`. What is not given stays, but for the heads: they fill a given hidden size, as the
            size of one head stays; and the query heads per key/value head stay, unless `num_key_value_heads` is given.
        dtype: of the new weights. They are on the device of `model`; attention is transformers' default one.

    Raises:
        ConfigError: the shape has an unknown key, is narrower than the model or does not fit together, or no model
            can be built in the dtype.
        UnsupportedModelError: the model is no plain Llama causal language model.
    """
    if not isinstance(model, LlamaForCausalLM) or type(model.config) is not LlamaConfig:
        raise UnsupportedModelError(
            f"Widening was asked for {type(model).__name__}, but it is known for LlamaForCausalLM only. "
            "Give a Llama causal language model."
        )
    config = _wide_config(model.config, shape, dtype)
    narrow = _plain_parameters(model)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with model.device:
            wide = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    _fill(wide, narrow, model.config)
    wide.generation_config = copy.deepcopy(model.generation_config)
    return wide


def _wide_config(old: Any, shape: Mapping[str, int], dtype: torch.dtype) -> LlamaConfig:
    if unknown := sorted(set(shape) - set(KEYS)):
        raise ConfigError(f"A shape has no {', '.join(map(repr, unknown))}. Known: {', '.join(KEYS)}.")
    if dtype not in DTYPES:
        raise ConfigError(f"No model can be built in {dtype}. Give one of {', '.join(map(str, DTYPES))}.")
    new = {name: getattr(old, name) for name in KEYS} | dict(shape)
    group = old.num_attention_heads // old.num_key_value_heads
    if "num_attention_heads" not in shape and "hidden_size" in shape:
        new["num_attention_heads"] = max(old.num_attention_heads, shape["hidden_size"] // old.head_dim)
    heads = new["num_attention_heads"]
    if "num_key_value_heads" not in shape:
        if heads % group:
            raise ConfigError(
                f"{heads} heads do not divide into groups of {group} per key/value head, as the model's do. "
                "Give num_attention_heads that do, or num_key_value_heads."
            )
        new["num_key_value_heads"] = heads // group
    for name in KEYS:
        if new[name] < getattr(old, name):
            raise ConfigError(
                f"{name} {new[name]} is narrower than the model's {getattr(old, name)}. Give at least as much."
            )
    key_heads = new["num_key_value_heads"]
    if heads % key_heads or new["hidden_size"] % heads:
        raise ConfigError(
            f"{key_heads} key/value heads, {heads} heads and hidden size {new['hidden_size']} do not fit together. "
            "Give numbers of which each is a multiple of the one before."
        )
    if key_heads < (needed := old.num_key_value_heads * math.ceil(group / (heads // key_heads))):
        raise ConfigError(
            f"{key_heads} key/value heads for {heads} heads leave no room for the model's {old.num_attention_heads} "
            f"heads in groups of {group}. Give at least {needed} key/value heads, or more heads."
        )
    # eps is added to the mean of squares, which added zeros make smaller
    eps = old.rms_norm_eps * old.hidden_size / new["hidden_size"]
    return LlamaConfig.from_dict(old.to_dict() | new | {"rms_norm_eps": eps, "dtype": dtype})


def _plain_parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the model's parameters by name if they are those that transformers gives a model of its config."""
    with torch.device("meta"):
        plain = LlamaForCausalLM(LlamaConfig.from_dict(model.config.to_dict()))
    expected = {name: parameter.shape for name, parameter in plain.named_parameters()}
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    other = sorted(
        name
        for name in expected.keys() | found.keys()
        if name not in found or found[name].shape != expected.get(name) or not found[name].is_floating_point()
    )
    if other:
        raise UnsupportedModelError(
            f"Widening was asked for a model with parameters unlike those of its config, {other[0]} among them. "
            "Give a model that is not quantized, optimised or adapted, or restore it first."
        )
    return found


def _places(old: Any, new: Any, device: torch.device) -> Places:
    """Return where each feature, inner unit and head goes.

    A query head reads key/value head `h // group`. With a smaller group a key/value head is needed more than once; with
    a larger one the last places of each group that has original heads stay free.
    """
    group, wide_group = (c.num_attention_heads // c.num_key_value_heads for c in (old, new))
    copies = math.ceil(group / wide_group)
    queries = [
        (head * copies + member // wide_group) * wide_group + member % wide_group
        for head in range(old.num_key_value_heads)
        for member in range(group)
    ]
    sources = [head for head in range(old.num_key_value_heads) for _ in range(copies)]

    def features(heads: list[int]) -> Tensor:
        first = torch.tensor(heads, device=device)[:, None] * old.head_dim
        return (first + torch.arange(old.head_dim, device=device)).flatten()

    same = {
        name: torch.arange(size, device=device)
        for name, size in {
            "vocabulary": old.vocab_size,
            "hidden": old.hidden_size,
            "inner": old.intermediate_size,
        }.items()
    }
    return {name: (indices, indices) for name, indices in same.items()} | {
        "query": (features(list(range(old.num_attention_heads))), features(queries)),
        "key": (features(sources), features(list(range(len(sources))))),
    }


@torch.no_grad()
def _fill(wide: LlamaForCausalLM, narrow: dict[str, Tensor], old: Any) -> None:
    """Write every weight of the wide model: the original's at their places, random ones in added layers, else zeros."""
    device = wide.device
    places = _places(old, wide.config, device)
    generator = torch.Generator(device).manual_seed(SEED)
    scale = math.sqrt(old.hidden_size / wide.config.hidden_size)  # normalised values are larger by its inverse
    for name, target in wide.named_parameters():  # a tied head is not among them
        kind, leaf = name.split(".")[-2:]
        axes, source = AXES[kind], narrow.get(name)
        is_norm = len(axes) == 1
        target.zero_()  # writes to every page
        if source is not None:
            _copy(target, source * scale if is_norm else source, [places[axis] for axis in axes])
        elif is_norm:
            target.fill_(scale)
        elif leaf == "weight" and kind not in OUTPUTS:
            target.normal_(std=STANDARD_DEVIATION, generator=generator)


def _copy(target: Tensor, source: Tensor, axes: list[tuple[Tensor, Tensor]]) -> None:
    """Write weights [n, m], or a norm or bias [n], at their places; a bias has the rows of its weight."""
    if source.dim() == 1:
        (rows, wide_rows), *_ = axes
        target[wide_rows] = source[rows].to(target.dtype)
    else:
        (rows, wide_rows), (columns, wide_columns) = axes
        target[wide_rows[:, None], wide_columns] = source[rows[:, None], columns].to(target.dtype)
