"""Makes the config of any architecture small: every size by the kind of its name, in all configs that it holds.

Lists with an entry per layer keep one layer of each kind, so that no kind of layer is lost. What a config cannot be
built with after that is left to the walk to report.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

VOCABULARY = 128
# the first pattern that matches a name's whole decides; None: as it is
SIZES: list[tuple[str, Any]] = [
    (r".*vocab.*size.*|n_vocab|num_embeddings", VOCABULARY),
    (r"n_group|num_expert_groups?|topk_group|moe_topk_group|mamba_n_groups|n_groups", 1),
    (r"rotary_dim", 8),
    (r".*_lora_rank|.*_rank", 16),
    (r".*head_dim.*|attention_head_size|d_kv|dim_head|d_head|.*_d_head|kv_channels|qk_rope_dim", 16),
    (r".*(topk|top_k).*|.*experts_per_(tok|token).*|moe_k", 2),
    (r".*shared_experts?", 1),
    (r".*experts.*", 4),
    (r".*first_k_dense.*|num_dense_layers|moe_layer_start_index|num_kv_shared_layers|num_nextn.*|num_mtp.*", None),
    (r".*_layer_period", 2),
    (r".*_layer_offset", 1),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"mamba_d_ssm|d_inner", 128),
    (r".*(key_value_heads|kv_heads|kv_n_heads|n_head_kv|multi_query_group_num|num_key_heads).*", 2),
    (r".*heads|n_head", 4),
    (r"depth|num_blocks|.*layers|n_layer", 2),
    (r".*(intermediate_size|ffn_dim|n_inner|d_ff|inner_dim|ffn_hidden_size|mlp_dim|expert_dim|inter.*size).*", 72),
    (r"attention_hidden_size|feed_forward_size|dim_ff|lru_width", 64),
    (r"d_model|n_embd|dim|.*emb(ed(ding)?)?_(dim|size)|.*hidden_(size|dim)|(.*_)?proj(ection)?_dim|output_dim", 64),
    (r"max_(source_|target_)?position(s|_embeddings)|n_positions|n_ctx|max_seq_len|seq_length", 256),
    (r"original_max_position_embeddings", 256),
    (r"sliding_window(_size)?|(attention_)?window(_size)?|local_attention_window(_len)?", 8),
    (r"image_size", 32),
    (r"(attention_|mamba_)?chunk_size", 8),
]
NOT_ARGUMENTS = (
    "model_type",
    "transformers_version",
    "architectures",
    "_name_or_path",
    "dtype",
    "id2label",
    "label2id",
)
# a head of its own: a tied one repeats the last token, whatever came before
TOKENS: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0, "bos_token_id": 1, "tie_word_embeddings": False}
# tried in turn: as many key/value heads as the sizes say, sizes given that are None, as many as query heads
FILLINGS: list[dict[str, Any]] = [{}, {"head_dim": 16, "num_key_value_heads": 2}, {"num_key_value_heads": 4}]
_TWO_HYBRIDS = ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"]
_SECTIONS = {
    "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}
}
# what a name cannot tell: sizes that follow from one another, and defaults with which nothing can be built
QUIRKS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dory": {
        "num_hidden_layers": 6, "n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"],
    },
    "dots3_note": {"text_config": {"head_dim": 32}},
    "dots3_note_text": {"head_dim": 32},
    "falcon_h1": {"mamba_d_head": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm46v": _SECTIONS,
    "glm4v": _SECTIONS,
    "glm5_next": {"text_config": {"index_kpool": 2}},
    "glm_ocr": _SECTIONS,
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"qk_head_dim": 32},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "paddleocr_vl": _SECTIONS,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [32, 32], "num_buckets": 4,
        "attn_layers": ["local", "lsh"],
    },
    "qwen2_5_vl": _SECTIONS,
    "qwen2_vl": _SECTIONS,
    "zamba": {
        "num_hidden_layers": 5, "layers_block_type": _TWO_HYBRIDS,
        "attention_hidden_size": 128, "attention_head_dim": 32,
    },
    "zamba2": {
        "num_hidden_layers": 5,
        "layers_block_type": _TWO_HYBRIDS,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 128, "attention_head_dim": 32, "mamba_headdim": 16, "n_mamba_heads": 8,
        "mamba_ngroups": 1,
    },
}  # fmt: skip


def small(name: str, value: Any) -> Any:
    """Return the value that a size called `name` is to have."""
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if re.fullmatch(r".*token(_id|_index|_ids)|.*_(id|index)", name):
        return value if abs(value) < VOCABULARY else 100 + value % 27
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            return value if size is None else min(value, size) if value > 0 else value
    return value


def kept_layers(values: dict[str, Any]) -> tuple[int, list[int]]:
    """Return how many layers a config has, and one of each kind, at least two."""
    count = next((values[n] for n in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if values.get(n)), 0)
    if not isinstance(count, int):
        return 0, []
    perlayer = [v for v in values.values() if isinstance(v, (list, tuple)) and len(v) == count > 1]
    perlayer = [v for v in perlayer if all(isinstance(x, (str, int, float, bool)) for x in v)]
    kept = [
        i for i in range(count) if all(tuple(v[i] for v in perlayer) != tuple(v[j] for v in perlayer) for j in range(i))
    ]
    kept = kept[:6] if len(kept) > 1 else [0, 1] if count > 1 else [0]
    return count, kept


def shrunk(values: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a small config that is otherwise as `values` say."""
    count, kept = kept_layers(values)
    made: dict[str, Any] = {}
    for name, value in values.items():
        if name == "per_layer_config" and isinstance(value, dict):
            made[name] = {kept.index(int(layer)): shrunk(v) for layer, v in value.items() if int(layer) in kept}
        elif name == "rope_parameters" and isinstance(value, dict) and "mrope_section" in value:
            part = int(4 * value.get("partial_rotary_factor", 1.0))
            made[name] = value | {"mrope_section": [part, part // 2, part // 2]}
        elif isinstance(value, dict):
            made[name] = shrunk(value) if "model_type" in value or name.endswith("config") else value
        elif isinstance(value, (list, tuple)) and count > 1 and len(value) == count:
            made[name] = [value[i] for i in kept]
        elif name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") and value == count and count:
            made[name] = len(kept)
        else:
            made[name] = small(name, value)
    return made


def give(values: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Set those of `wanted` that a config, and each config in it, has."""
    values.update({name: value for name, value in wanted.items() if name in values})
    for value in values.values():
        if isinstance(value, dict):
            give(value, wanted)


def small_configs(model_type: str) -> list[Callable[[], PreTrainedConfig]]:
    """Return what makes a small config of `model_type`, the likeliest first; each raises where its class objects."""
    cls = CONFIG_MAPPING[model_type]
    values = cls().to_dict()
    for name in NOT_ARGUMENTS:
        values.pop(name, None)
    found = []
    for filled in FILLINGS:
        made = shrunk(values)
        give(made, TOKENS | filled)
        for name, value in QUIRKS.get(model_type, {}).items():
            made[name] = made[name] | value if name == "text_config" else value
        found.append(functools.partial(cls, **made))
    return found
