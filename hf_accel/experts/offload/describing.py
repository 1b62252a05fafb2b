"""Which experts of a model can lie in a file."""

from __future__ import annotations

from typing import Any

import torch

from hf_accel.core.model.anatomy import holds_experts
from hf_accel.core.model.packed_experts import packed_products
from hf_accel.experts.offload.store import Modules
from hf_accel.experts.offload.stored import StoredExperts


def described(model: Any, dtype: torch.dtype) -> tuple[Modules, list[str]]:
    """Return the modules whose experts can be moved to a file, and sentences on those that cannot."""
    found: Modules = []
    skipped: list[str] = []
    start = first = 0
    for path, module in model.named_modules():
        if not holds_experts(module) and packed_products(module) is None:
            continue
        try:
            each = StoredExperts(path, module, dtype, start, first)
        except ValueError as error:
            skipped.append(f"the experts {path} stay as they are: {error}")
            continue
        found.append((module, each))
        start, first = each.end, first + each.form.experts
    return found, skipped
