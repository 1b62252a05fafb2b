"""Everything about a model that optimising must leave alone or give back."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from transformers import PreTrainedModel


def bits(tensor: torch.Tensor) -> str:
    """Return a digest of a tensor's values, dtype and shape."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


def hooks(module: torch.nn.Module) -> dict[str, list[int]]:
    """Return the identities of a module's hooks by kind."""
    return {
        name: [id(hook) for hook in value.values()]
        for name, value in vars(module).items()
        if name.endswith("_hooks") and isinstance(value, dict)
    }


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """Return a comparable description of `model`: weights bit for bit, classes, attributes, configs, hooks."""
    found: dict[str, Any] = {
        "generation_config": model.generation_config.to_dict() if hasattr(model, "generation_config") else None,
        "state_dict": {name: bits(tensor) for name, tensor in model.state_dict().items()},
        "buffers": {name: bits(tensor) for name, tensor in model.named_buffers()},
        "parameters": {name: (id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)},
    }
    for name, module in model.named_modules(remove_duplicate=False):
        found[f"module {name}"] = {
            "id": id(module),
            "class": type(module),
            "attributes": sorted(vars(module)),
            "training": module.training,
            "hooks": hooks(module),
        }
        config = vars(module).get("config")
        if config is not None:
            found[f"config {name}"] = {
                "id": id(config),
                "class": type(config),
                "attention": config._attn_implementation,
                "values": config.to_dict(),
                "attributes": sorted(vars(config)),
            }
    return found


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return what differs between two fingerprints, for a message; empty if nothing does."""
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in before.keys() | after.keys()
        if before.get(key) != after.get(key)
    ]
