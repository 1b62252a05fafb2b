"""What a conversion will cost, before any weight changes: tried on a copy that shares the model's tensors.

Each ratio is converted and measured on rows that it was not fitted to. Memory: the projections of attention once more
for each ratio at a time. Time: that of the conversions, and a pass over the rows kept back for each layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hf_accel.core.drift import CACHE
from hf_accel.core.model.modes import evaluating
from hf_accel.errors import UnsupportedModelError
from hf_accel.gqa.config import GQAConfig
from hf_accel.gqa.conversion import reshaped_model, with_kv_heads
from hf_accel.gqa.converting import convert_into
from hf_accel.gqa.heads import layers_of
from hf_accel.gqa.text import texts_for
from hf_accel.measure.quality import CalibrationText, Quality, QualityReference

MOST_SHARE = 1.5  # of the mean layer's KL: a layer that costs more is named


@dataclass(frozen=True)
class Ratio:
    """One number of key and value heads: what it is expected to cost, and the bytes of the cache for each token.

    layers: KL with one layer converted alone, for each layer; empty where it was not asked for.
    """

    kv_heads: int
    quality: Quality
    cache_bytes: int
    layers: tuple[float, ...] = ()


@dataclass(frozen=True)
class GQAPreview:
    """What each ratio is expected to cost, the largest first; `kv_heads` and `cache_bytes` are the model's now."""

    kv_heads: int
    cache_bytes: int
    method: str
    ratios: tuple[Ratio, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def sensitive(self) -> list[int]:
        """Return the layers that cost more than MOST_SHARE of the mean layer, the costliest first."""
        layers = next((ratio.layers for ratio in self.ratios if ratio.layers), ())
        most = MOST_SHARE * sum(layers) / max(1, len(layers))
        return sorted((i for i, kl in enumerate(layers) if kl > most), key=lambda i: -layers[i])

    def __str__(self) -> str:
        now = f"now {self.kv_heads}, {self.cache_bytes} bytes of cache per token"
        lines = [f"fewer key/value heads ({self.method}), {now}:"]
        for ratio in self.ratios:
            quality = ratio.quality
            line = f"  {ratio.kv_heads}: KL {quality.kl:.3g} nats per token"
            if quality.perplexity_before is not None and quality.perplexity_after is not None:
                line += f", perplexity {quality.perplexity_before:.2f} -> {quality.perplexity_after:.2f}"
            lines.append(f"{line}, cache {ratio.cache_bytes} bytes per token")
        for ratio in self.ratios:
            if ratio.layers:
                each = ", ".join(f"{kl:.2g}" for kl in ratio.layers)
                lines.append(f"  KL of each layer alone at {ratio.kv_heads}: {each}")
        if found := ", ".join(map(str, self.sensitive())):
            lines.append(
                f"  these cost most, and would gain by more heads if their architecture had them: layer {found}"
            )
        return "\n".join(lines)


def previewed(
    model: Any, config: GQAConfig, given: CalibrationText | None, advance: Callable[[], None] = lambda: None
) -> GQAPreview:
    """Return what the conversion of `model`, which is left as it is, would cost at every ratio it can have.

    Layers are looked at alone at the ratio that `config` asks for.

    Raises:
        ConfigError: as `texts_for`. UnsupportedModelError: as `convert_into`.
    """
    layers = layers_of(model)
    fitted, rest = texts_for(model, config, given)
    ids = None if fitted is None else fitted.ids
    with evaluating(model):
        reference = QualityReference(model, rest)
        ratios = []
        for kv_heads in _ratios(model, layers[0].kv_heads):
            wanted = GQAConfig(num_kv_heads=kv_heads, method=config.method, repair_steps=config.repair_steps)
            new = reshaped_model(model, kv_heads, shares=True)
            convert_into(new, model, wanted, ids, advance)
            quality = reference.of(new)
            alone = _alone(model, new, reference, advance) if kv_heads == config.num_kv_heads else ()
            ratios.append(Ratio(kv_heads, quality, cache_bytes(new), alone))
    return GQAPreview(layers[0].kv_heads, cache_bytes(model), config.method, tuple(ratios))


def _ratios(model: Any, kv_heads: int) -> list[int]:
    """Return the numbers of heads below `kv_heads` that the architecture can have, the largest first."""
    found = []
    for count in range(kv_heads - 1, 0, -1):
        if model.config.num_attention_heads % count == 0:
            try:
                with_kv_heads(model.config, count)
            except UnsupportedModelError:
                continue
            found.append(count)
    return found


def _alone(model: Any, new: Any, reference: QualityReference, advance: Callable[[], None]) -> tuple[float, ...]:
    """Return the KL of `model` with the attention of one layer of `new` at a time; `model` is a copy, and put back."""
    found = []
    for old, made in zip(layers_of(model), layers_of(new), strict=True):
        old.parent._modules[old.name] = made.module
        try:
            found.append(reference.of(model).kl)
        finally:
            old.parent._modules[old.name] = old.module
        advance()
    return tuple(found)


@torch.no_grad()
def cache_bytes(model: Any) -> int:
    """Return the bytes that the cache of `model` keeps for a token of one row, found by reading two tokens."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    with evaluating(model):
        cache = model(ids, use_cache=True)[CACHE]
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) // 2
