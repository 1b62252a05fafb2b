"""What makes two runs the same run: a digest of weights, text and settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor, nn


def fingerprint(models: Sequence[nn.Module], tensors: Sequence[Tensor], settings: dict[str, Any]) -> str:
    """Return a digest of the parameters of models, of tensors and settings. Cost: every weight is read once."""
    digest = xxhash.xxh3_128(json.dumps(settings, sort_keys=True, default=str).encode())
    for model in models:
        for name, parameter in model.named_parameters():
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            digest.update(_bytes(parameter))
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
