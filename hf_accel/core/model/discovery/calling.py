"""How a decoder layer is called and answers: which arguments are its cache and mask, and what the others are."""

from __future__ import annotations

from torch import Tensor
from transformers import Cache

from hf_accel.core.model.discovery.forms import CARRIED, CallForm
from hf_accel.core.model.discovery.listening import Recorded, hidden_name
from hf_accel.core.model.discovery.readings import Unexplained, the_only


def described_call(record: Recorded) -> CallForm:
    """Return how the layer is called and answers, as its record has it.

    Raises: Unexplained.
    """
    arguments = record.arguments
    caches = [name for name, value in arguments.items() if isinstance(value, Cache)]
    masks = [name for name, value in arguments.items() if isinstance(value, Tensor) and value.dim() == 4]
    cache = the_only(caches, "where it is given the cache")
    mask = the_only(masks, "where it is given the mask")
    fixed = []
    for name, value in arguments.items():
        if name in CARRIED or name in (cache, mask):
            continue
        if not isinstance(value, (bool, int, float, str, type(None))):
            raise Unexplained(f"it is given {name}, of which nothing is known")
        fixed.append((name, value))
    output = record.output
    length = len(output) if isinstance(output, tuple) else 0
    if length and any(entry is not None for entry in output[1:]):
        raise Unexplained("it returns more than its hidden states")
    return CallForm(hidden_name(record.layer), cache, mask, tuple(fixed), length)
