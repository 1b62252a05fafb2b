"""Models whose heads are equal up to maps that leave the function alone, spelled out pair by pair and head by head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import heads as tiny
import torch
from models import VOCABULARY
from torch import Tensor
from transformers import PreTrainedModel

from hf_accel.gqa.architectures import in_architecture
from hf_accel.gqa.heads import Heads, attention_layers, read_heads, write_heads


@dataclass(frozen=True)
class Case:
    """A model, and how the numbers of its heads may be turned.

    rotary: numbers of a head that rotate, None: all of them. order: "halves" or "neighbours". normed: what stands
    between keys and scores, "": nothing, "rms": a norm without a mean, which leaves signs and the size of a whole head,
    "layer": a norm with one and with a bias, which leaves the size. architecture: that the model is expressed in first.
    more: the key heads of the twin whose heads are equal.
    """

    name: str
    rotary: int | None = None
    order: str = "halves"
    normed: str = ""
    architecture: str = ""
    more: int = 4


CASES: dict[str, Case] = {
    "llama": Case("llama"),
    "mistral": Case("mistral"),
    "qwen2": Case("qwen2"),
    "qwen3": Case("qwen3", normed="rms"),
    "gemma2": Case("gemma2"),
    "gemma3": Case("gemma3", normed="rms"),
    "phi3": Case("phi3"),
    "mixtral": Case("mixtral"),
    "qwen3_moe": Case("qwen3_moe", normed="rms"),
    "stablelm": Case("stablelm", rotary=6),
    "phi": Case("phi", normed="layer"),
    "starcoder2": Case("starcoder2"),
    "cohere": Case("cohere", order="neighbours"),
    "granite": Case("granite"),
    "falcon": Case("falcon_one"),
    "falcon, grouped": Case("falcon_grouped"),
    "gpt_bigcode": Case("bigcode_one", rotary=0),
    "gpt_neox as phi": Case("neox_parallel", rotary=4, architecture="phi"),
    "gptj as phi": Case("gptj", rotary=8, architecture="phi"),
    "gpt2 as gpt_bigcode": Case("gpt2", rotary=0, architecture="gpt_bigcode"),
}


def original(case: Case) -> PreTrainedModel:
    """Return the model with few heads; where it has as many as queries, with one for all, picked anew."""
    model = tiny.made(case.name)
    if case.architecture:
        model = in_architecture(model, case.architecture)
        model = tiny.converted(model, 1, shares=False)
    return model


def rows(count: int = 16, tokens: int = 32, seed: int = 5) -> Tensor:
    """Return random calibration ids [count, tokens]."""
    return torch.randint(8, VOCABULARY, (count, tokens), generator=torch.Generator().manual_seed(seed))


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits.double()


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a head's rows [D, E] in fp64, its bias as the last column."""
    column = torch.zeros(len(weight), 1, dtype=weight.dtype) if bias is None else bias[:, None]
    return torch.cat([weight, column], 1).double()


def key_map(case: Case, size: int, generator: torch.Generator) -> Tensor:
    """Return a matrix [D, D] that keys of a head may be multiplied by while its queries take the inverse transposed."""
    rotary = size if case.rotary is None else case.rotary
    found = torch.zeros(size, size, dtype=torch.float64)
    for j in range(rotary // 2):
        a, b = (j, j + rotary // 2) if case.order == "halves" else (2 * j, 2 * j + 1)
        if case.normed:  # with a mean and a bias, signs are not free either
            sign = 1.0 if case.normed == "layer" else 0.0
            sign = sign or (1.0 if torch.rand((), generator=generator) < 0.5 else -1.0)
            found[a, a] = found[b, b] = sign
            continue
        angle = 6.283 * torch.rand((), generator=generator, dtype=torch.float64)
        length = 0.5 + torch.rand((), generator=generator, dtype=torch.float64)
        found[a, a] = found[b, b] = length * angle.cos()
        found[b, a] = length * angle.sin()
        found[a, b] = -length * angle.sin()
    if rotary < size:
        found[rotary:, rotary:] = any_map(size - rotary, generator)
    return found


def any_map(size: int, generator: torch.Generator) -> Tensor:
    """Return an invertible matrix whose largest singular value is some times the smallest."""
    left, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return left @ torch.diag(0.5 + 1.5 * torch.rand(size, generator=generator, dtype=torch.float64)) @ right


def expanded(heads: Heads, kv_heads: int) -> Heads:
    """Return the same heads with every key and value head as often as makes `kv_heads`."""
    times = kv_heads // len(heads.k)
    k, v = heads.k.repeat_interleave(times, 0), heads.v.repeat_interleave(times, 0)
    k_bias, v_bias = (None if b is None else b.repeat_interleave(times, 0) for b in (heads.k_bias, heads.v_bias))
    return replace(heads, k=k, v=v, k_bias=k_bias, v_bias=v_bias)


def disguised(heads: Heads, case: Case, generator: torch.Generator, *, shuffles: bool) -> tuple[Heads, list[int]]:
    """Return heads that compute the same, each key head turned its own way, and the old place of each key head."""
    groups, queries = len(heads.k), len(heads.q)
    each = queries // groups
    places = torch.randperm(groups, generator=generator).tolist() if shuffles else list(range(groups))
    q, k, v, o = heads.q.clone(), heads.k.clone(), heads.v.clone(), heads.o.clone()
    q_bias, k_bias, v_bias = (None if b is None else b.clone() for b in (heads.q_bias, heads.k_bias, heads.v_bias))
    for new, old in enumerate(places):
        turn = key_map(case, heads.k.shape[1], generator)
        # a norm takes the size of a head's keys out again
        scale = 0.5 + 1.5 * float(torch.rand((), generator=generator)) if case.normed else 1.0
        mixing = any_map(heads.v.shape[1], generator)
        key = scale * turn @ with_bias(heads.k[old], None if heads.k_bias is None else heads.k_bias[old])
        value = mixing @ with_bias(heads.v[old], None if heads.v_bias is None else heads.v_bias[old])
        k[new], v[new] = key[:, :-1], value[:, :-1]
        if k_bias is not None:
            k_bias[new] = key[:, -1]
        if v_bias is not None:
            v_bias[new] = value[:, -1]
        for i in range(each):
            here, there = new * each + i, old * each + i
            query = torch.linalg.inv(turn).T @ with_bias(
                heads.q[there], None if heads.q_bias is None else heads.q_bias[there]
            )
            q[here] = query[:, :-1]
            if q_bias is not None:
                q_bias[here] = query[:, -1]
            o[:, here] = (heads.o[:, there].double() @ torch.linalg.inv(mixing)).to(o)
    return Heads(q, k, v, o, q_bias, k_bias, v_bias, heads.o_bias), places


def twin(model: PreTrainedModel, case: Case, kv_heads: int, *, seed: int = 0) -> tuple[Any, list[list[int]]]:
    """Return a model with `kv_heads` that computes what `model` does, and of each layer the old places of its heads."""
    generator = torch.Generator().manual_seed(seed)
    made = [read_heads(layer, model.config) for layer in attention_layers(model)]
    wide = [expanded(heads, kv_heads) for heads in made]
    found = tiny.with_heads(model, kv_heads, wide, shares=False)
    shuffled = [disguised(h, case, generator, shuffles=not layer.fixed)
                for h, layer in zip(wide, attention_layers(model), strict=True)]  # fmt: skip
    for layer, (heads, _) in zip(attention_layers(found), shuffled, strict=True):
        write_heads(layer, found.config, heads)
    return found, [places for _, places in shuffled]
