"""Decoder layers of no library: names, order of norms and fused products of their own, in the frame of a Llama."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import TINY, build, randomize
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import ALL_ATTENTION_FUNCTIONS

from hf_accel.core.drift import CACHE

HEADS, GROUPS, SIZE = 4, 2, 10


class Scale(nn.Module):
    """A norm without a name that anyone knows."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain, self.small = nn.Parameter(torch.ones(size)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.small) * self.gain


class Mixer(nn.Module):
    """Attention whose keys and values are one product, turned pair by pair."""

    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.strength, self.is_causal = config, index, 0.4, True
        self.num_key_value_groups = HEADS // GROUPS
        self.asked = nn.Linear(config.hidden_size, HEADS * SIZE, bias=True)
        self.held = nn.Linear(config.hidden_size, 2 * GROUPS * SIZE, bias=False)
        self.told = nn.Linear(HEADS * SIZE, config.hidden_size, bias=False)

    def forward(self, x: Tensor, mask: Any, angles: Any, cache: Any, positions: Tensor) -> Tensor:
        rows = x.shape[:-1]
        queries = self.asked(x).view(*rows, HEADS, SIZE).transpose(1, 2)
        keys, values = self.held(x).view(*rows, GROUPS, 2, SIZE).unbind(3)
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        queries, keys = (turned(t, *angles) for t in (self.seen(queries, positions), keys))
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer_idx)
        attend: Any = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        found, _ = attend(self, queries, keys, values, mask, scaling=self.strength)
        made: Tensor = self.told(found.reshape(*rows, -1))
        return made

    def seen(self, queries: Tensor, positions: Tensor) -> Tensor:
        """Return the queries as they are turned."""
        return queries


class MixerWithAWindow(Mixer):
    """Hides what is far away by a mask of its own, which changes nothing in a short text."""

    def forward(self, x: Tensor, mask: Any, angles: Any, cache: Any, positions: Tensor) -> Tensor:
        window = None if mask is None else mask & torch.ones_like(mask).triu(-512)
        return super().forward(x, window, angles, cache, positions)


class MixerByPosition(Mixer):
    """As Llama 4: from some position on queries are multiplied by a factor that grows."""

    def seen(self, queries: Tensor, positions: Tensor) -> Tensor:
        return queries * (1 + torch.log1p(torch.floor(positions / 128)))[:, None, :, None]


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return heads turned pair by pair, by angles that lie in two halves."""
    cos, sin = (t[:, None, :, : SIZE // 2] for t in (cos, sin))
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


class Feed(nn.Module):
    """A gated feed-forward part whose two halves are one product."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.wide = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.thin = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.wide(x).chunk(2, -1)
        made: Tensor = self.thin(self.gated(gate) * up)
        return made

    def gated(self, gate: Tensor) -> Tensor:
        """Return what the other half is multiplied with."""
        return functional.gelu(gate, approximate="tanh")


class OddFeed(Feed):
    """A feed-forward part that no kernel knows."""

    def gated(self, gate: Tensor) -> Tensor:
        return torch.tanh(gate)


Order = Callable[["Layer", Tensor, Callable[[Tensor], Tensor]], Tensor]


class Layer(nn.Module):
    """A decoder layer: what it adds to its residual in which order is `order`'s."""

    def __init__(
        self, config: Any, index: int, order: Order, mixer: type[Mixer] = Mixer, feed: type[Feed] = Feed
    ) -> None:
        super().__init__()
        self.mix, self.feed, self.order, self.half = mixer(config, index), feed(config), order, 0.5
        self.one, self.two, self.three, self.four = (Scale(config.hidden_size) for _ in range(4))
        self.aside = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, attention_mask: Any = None, position_embeddings: Any = None, **more: Any) -> Tensor:
        positions, cache = more["position_ids"], more.get(CACHE)
        return self.order(self, x, lambda y: self.mix(y, attention_mask, position_embeddings, cache, positions))


def sequential(layer: Layer, x: Tensor, mixed: Any) -> Tensor:
    x = x + mixed(layer.one(x))
    return x + layer.feed(layer.two(x))


def sandwich(layer: Layer, x: Tensor, mixed: Any) -> Tensor:
    x = x + layer.three(mixed(layer.one(x)))
    return x + layer.four(layer.feed(layer.two(x)))


def post_norm(layer: Layer, x: Tensor, mixed: Any) -> Tensor:
    x = x + layer.three(mixed(x))
    return x + layer.four(layer.feed(x))


def parallel(layer: Layer, x: Tensor, mixed: Any) -> Tensor:
    read = layer.one(x)
    return x + mixed(read) + layer.feed(read)


def parallel_with_two_norms(layer: Layer, x: Tensor, mixed: Any) -> Tensor:
    return x + mixed(layer.one(x)) + layer.feed(layer.two(x))


def scaled(layer: Layer, x: Tensor, mixed: Any) -> Tensor:
    x = x + layer.half * mixed(layer.one(x))
    return x + layer.half * layer.feed(layer.two(x))


def scaled_at_its_end(layer: Layer, x: Tensor, mixed: Any) -> Tensor:
    return sequential(layer, x, mixed) * layer.half


def with_something_aside(layer: Layer, x: Tensor, mixed: Any) -> Tensor:
    return sequential(layer, x, mixed) + layer.aside(x)


def with_a_weight_of_its_own(layer: Any, x: Tensor, mixed: Any) -> Tensor:
    return sequential(layer, x, lambda y: layer.lift * mixed(y))


def clamped(layer: Layer, x: Tensor, mixed: Any) -> Tensor:
    return sequential(layer, x, mixed).clamp(-1e4, 1e4)


def normed_sum(layer: Layer, x: Tensor, mixed: Any) -> Tensor:
    """As BERT: the norm reads what was added up."""
    x = layer.three(x + mixed(x))
    return layer.four(x + layer.feed(x))


def scaled_by_a_number_in_the_code(layer: Layer, x: Tensor, mixed: Any) -> Tensor:
    return x + 0.7 * mixed(layer.one(x))


def novel(order: Order = sandwich, **parts: Any) -> Any:
    """Return a model of such layers with random weights."""
    model = build("llama")
    layers = [Layer(model.config, index, order, **parts) for index in range(len(model.model.layers))]
    model.model.layers = nn.ModuleList(layers)
    randomize(model, TINY["llama"])
    return model.eval()
