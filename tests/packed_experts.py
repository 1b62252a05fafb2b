"""Tiny mixtures in any dtype, their experts, the rows of an expert by definition, and stock twins of packed ones."""

from __future__ import annotations

import copy
from typing import Any

import mixtures
import torch
from mixtures import MIXTURES, UNREGISTERED
from torch import Tensor, nn

import hf_accel

NAMES = [name for name in MIXTURES if name != UNREGISTERED]
LAYOUTS = ["mixtral", "gpt_oss", "aria"]  # one of each
PARTS = ("gate_up_proj", "down_proj")


def mixture(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a fresh model; two calls with the same arguments return equal models that share nothing."""
    model = mixtures.mixture(name)
    for parameter in model.parameters():  # buffers of rotary embeddings stay as a loader makes them
        parameter.data = parameter.data.to(dtype)
    return model


def experts_of(model: Any) -> dict[str, Any]:
    """Return path -> module of experts, packed or not."""
    found = {path: module for path, module in model.named_modules() if hasattr(module, "gate_up_proj")}
    return {path: module for path, module in found.items() if type(module).__name__.endswith("Experts")}


def routing(experts: int, tokens: int, choices: int = 2) -> tuple[Tensor, Tensor]:
    """Return ids and weights [tokens, choices], the ids of a token all different."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:choices] for _ in range(tokens)])
    return ids, torch.rand(tokens, choices, generator=generator)


def rows_of(experts: Any, name: str, index: int) -> Tensor:
    """Return the weight [N, K] of an expert by the definition of its layout, row by row, gate above up."""
    weight = getattr(experts, name).detach()[index]
    rows = [weight[:, n] if experts.is_transposed else weight[n] for n in range(weight.shape[experts.is_transposed])]
    if name == "gate_up_proj" and not experts.is_concatenated:
        half = len(rows) // 2
        rows = [rows[2 * n] for n in range(half)] + [rows[2 * n + 1] for n in range(half)]
    return torch.stack(rows)


def put_rows(experts: Any, name: str, index: int, rows: Tensor) -> None:
    """Write the same into the module."""
    weight = getattr(experts, name).data[index]
    if name == "gate_up_proj" and not experts.is_concatenated:
        half = len(rows) // 2
        rows = torch.stack([rows[n // 2 + half * (n % 2)] for n in range(2 * half)])
    weight.copy_(rows.T if experts.is_transposed else rows)


def twin_of(packed: Any, original: Any) -> Any:
    """Return the stock module with the values that the codes of `packed` stand for."""
    found = copy.deepcopy(original)
    for name in PARTS:
        for index, product in enumerate(getattr(packed, name)):
            put_rows(found, name, index, product.weight.dequantize())
    found.config._experts_implementation = "eager"
    return found


def pair(name: str, config: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return packed experts, and the stock module of their dequantized weights."""
    original, model = mixture(name, dtype), hf_accel.optimize(mixture(name, dtype), config)
    path, packed = next(iter(experts_of(model).items()))
    return packed, twin_of(packed, original.get_submodule(path))


class Squared(nn.Module):
    """An activation that no kernel has."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu().square()
