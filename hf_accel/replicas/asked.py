"""One request to a replica: what is written, from what, and by which seed. Its answer is a function of these alone."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.errors import ConfigError

# what is done while text is written lives in the process that asks for it
HERE_ALONE = {"streamer": "Iterate over stream(...) instead", "assistant_model": "Give the recipe's plan a draft model"}


@dataclass(frozen=True)
class Asked:
    """inputs: a text, or keyword arguments of `generate` with "input_ids" [B, T]; seed: of what is drawn."""

    inputs: str | dict[str, Any]
    options: dict[str, Any]
    seed: int


def asked_of(inputs: Any, options: Mapping[str, Any]) -> Asked:
    """Return the request: a text, token ids [B, T] or [T], or a tokenizer's output, and keywords of `generate`.

    A seed is drawn where none is given, so that a request that is sent again draws the same tokens.

    Raises:
        ConfigError: the inputs are none of these, or a keyword cannot be sent to another process.
    """
    kept = dict(options)
    seed = kept.pop("seed", None)
    for name, advice in HERE_ALONE.items():
        if kept.get(name) is not None:
            raise ConfigError(f"{name} is an object of this process, and text is written in another. {advice}.")
    if seed is None:
        seed = secrets.randbits(63)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ConfigError(f"seed is {seed!r}; it is a number from 0 to 2**63 - 1.")
    return Asked(_inputs(inputs), kept, seed)


def _inputs(inputs: Any) -> str | dict[str, Any]:
    if isinstance(inputs, str):
        return inputs
    if isinstance(inputs, Mapping) and "input_ids" in inputs:
        return {name: torch.as_tensor(value) for name, value in inputs.items()}
    if isinstance(inputs, (torch.Tensor, list)):
        try:
            ids = torch.as_tensor(inputs)
        except (TypeError, ValueError, RuntimeError):
            ids = torch.empty(0)
        if ids.dim() in (1, 2) and ids.numel() and not ids.is_floating_point():
            return {"input_ids": ids if ids.dim() == 2 else ids[None]}
    raise ConfigError(
        f"inputs is a {type(inputs).__name__}; give a text, a list of texts, token ids [B, T], or a tokenizer's output."
    )
