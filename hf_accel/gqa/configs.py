"""How the configs of transformers say how many key and value heads a model has."""

from __future__ import annotations

import copy
from typing import Any

from hf_accel.errors import ConfigError, UnsupportedModelError
from hf_accel.gqa.architectures.table import NO_WAY, architectures_for


def stated(config: Any, kv_heads: int) -> Any:
    """Return a deep copy of a config that says `kv_heads`; whether a model built from it has them is another question.

    Raises:
        ConfigError: `kv_heads` do not divide the query heads.
        UnsupportedModelError: the architecture has no word for it; the message names those that have.
    """
    heads = config.num_attention_heads
    if not isinstance(kv_heads, int) or isinstance(kv_heads, bool) or kv_heads < 1 or heads % kv_heads:
        raise ConfigError(
            f"{heads} query heads cannot share {kv_heads} key/value heads; the number has to divide {heads}."
        )
    new = copy.deepcopy(config)
    if state := _OWN_WORDS.get(config.model_type):
        state(new, heads, kv_heads)
    elif isinstance(getattr(config, "num_key_value_heads", None), int):
        new.num_key_value_heads = kv_heads
    else:
        why = f"its config has no number of them. {advice(config.model_type)}"
        raise _inexpressible(config, kv_heads, why)
    return new


def _state_bigcode(config: Any, heads: int, kv_heads: int) -> None:
    if kv_heads not in (1, heads):
        raise _inexpressible(config, kv_heads, f"it has one, or as many as query heads, {heads}.")
    config.multi_query, config.num_key_value_heads = kv_heads == 1, kv_heads


def _state_falcon(config: Any, heads: int, kv_heads: int) -> None:
    grouped = bool(config.new_decoder_architecture)
    has_one_norm = config.num_ln_in_parallel_attn == 1 if grouped else bool(config.parallel_attn)
    if kv_heads == 1 and (has_one_norm or not grouped):
        # of the two layouts for one head, only this one also keeps one head in the cache
        config.new_decoder_architecture, config.multi_query = False, True
        config.parallel_attn = bool(grouped or config.parallel_attn)
    elif grouped or (has_one_norm and kv_heads != heads):
        config.num_ln_in_parallel_attn = 1 if has_one_norm else 2
        config.new_decoder_architecture = True
    elif kv_heads == heads:
        config.multi_query = False
    else:
        why = f"with attention and MLP one after the other it has one, or as many as query heads, {heads}."
        raise _inexpressible(config, kv_heads, why)
    config.num_kv_heads = kv_heads


_OWN_WORDS = {"falcon": _state_falcon, "gpt_bigcode": _state_bigcode}  # architectures that say it in words of their own


def _inexpressible(config: Any, kv_heads: int, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"The architecture {config.model_type} cannot have {kv_heads} key/value heads: {why}")


def advice(model_type: str) -> str:
    """Return a sentence on the architectures in which such a model can be expressed."""
    if targets := architectures_for(model_type):
        return f"Express it in another architecture first: {' or '.join(targets)}."
    reason = f": {why}" if (why := NO_WAY.get(model_type)) else ""
    return f"There is no other architecture to express it in that could{reason}."
