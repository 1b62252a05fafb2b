"""How many experts a model sends each token to."""

from __future__ import annotations

from typing import Any

_NAMES = ("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token")


def active_experts(model: Any) -> int | None:
    """Return the experts of a token in one layer; None where the model's config does not say."""
    config = model.config.get_text_config(decoder=True)
    found = [value for name in _NAMES if isinstance(value := getattr(config, name, None), int)]
    return found[0] if found else None
