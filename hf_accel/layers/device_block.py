"""A whole decoder layer in about nine launches on a GPU, for steps of a few rows over a static cache.

Stock launches some thirty kernels per layer and token, most of which wait for memory or for nothing. Here what follows
one another is joined as far as one launch can see it; a layer is only replaced after it gave what its own forward gives
(`audit`), and any call that is not a plain step over a static cache goes to the layer's own forward. Nothing asks the
device, so that steps can be captured as graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from hf_accel.core.calls.hosting import Host
from hf_accel.core.config import Config
from hf_accel.core.journal import subclass
from hf_accel.core.model.modes import evaluating
from hf_accel.core.model.watching import Surroundings
from hf_accel.core.steps.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import VerificationError
from hf_accel.kernels import device, triton
from hf_accel.layers.audit import Audit
from hf_accel.layers.block import layer_bound, layer_forward, with_feed_forward
from hf_accel.layers.guard import BlockStep
from hf_accel.layers.trial import Extent


@dataclass(frozen=True, kw_only=True)
class DeviceBlockConfig(Config):
    """Decoder layers in about nine launches each on a GPU, where the architecture is described.

    max_rows: steps of up to this many rows (batch x query tokens), 1 to 32, of at most 16 tokens; larger ones run the
        layer's own forward. Layers with packed weights go up to 8 rows: above, each product is made by the fastest of
        several kernels, which its own module chooses by timing.
    """

    max_rows: int = 16

    def __post_init__(self) -> None:
        self.check_integer("max_rows", 1, device.MAX_ROWS)


class DeviceBlockPatcher(Patcher[DeviceBlockConfig], config=DeviceBlockConfig):
    stage = Stage.ATTENTION
    fidelity = Fidelity.EXACT
    occupies = "decoder layers"

    def obstacles(self, setting: Setting) -> list[str]:
        anatomy = setting.anatomy
        found = []
        if reason := triton.obstacle(anatomy.device):
            found.append(f"{reason}.")
        if anatomy.dtype not in device.DTYPES:
            found.append(f"there are no kernels in Triton for {anatomy.dtype}.")
        if not setting.is_glance and not anatomy.blocks:
            found.append(f"{anatomy.blocks_missing}.")
        return found

    def patch(self, setting: Setting, host: Host) -> Change:
        anatomy, most = setting.anatomy, self.config.max_rows
        skipped = list(anatomy.odd_layers)
        count, failed = 0, None
        with evaluating(anatomy.model):
            audit = Audit(setting, "DeviceBlockConfig", ProbeCache)
            surroundings = Surroundings(m for block in anatomy.blocks for m in (block.layer, *block.modules))
            for block in anatomy.blocks:
                try:
                    step = BlockStep(block, Extent(most, most), surroundings, device.DeviceBlock)
                    audit.check(block, partial(device_step, step, is_audit=True), layer_bound(block, anatomy.dtype))
                except (ValueError, VerificationError) as error:
                    skipped.append(f"layer {block.index} runs as it is: {error}")
                    failed = failed or (error if isinstance(error, VerificationError) else None)
                    continue
                if step.watch.is_hooked():
                    skipped.append(f"layer {block.index} is hooked, and runs as it is as long as it is")
                made = subclass(DeviceLayer, type(block.layer), step=step, forward=device_forward(step))
                host.journal.swap_class(block.layer, made)
                count += 1
        if not count and failed is not None:
            raise failed
        return Change(f"{count} decoder layers run in about nine launches for up to {most} rows", 0, tuple(skipped))


class DeviceLayer:
    """Marks decoder layers whose `forward` is a `device_forward`."""

    step: BlockStep


def device_forward(step: BlockStep) -> Callable[..., Any]:
    """Return the `forward` of a layer: steps over static caches by kernels, all else as its own class does."""
    return layer_forward(DeviceLayer, step, device_step)


def device_step(
    step: BlockStep, hidden: torch.Tensor, kwargs: dict[str, Any], *, is_audit: bool = False
) -> torch.Tensor | None:
    """Return the layer's output [B, T, E], or None if this is no step over a static cache that the kernels cover.

    Masks are not asked for: what is visible follows from the lengths, starts and window of the cache's layer.
    """
    if type(hidden) is not torch.Tensor or len(shape := hidden.shape) != 3:
        return None
    batch, tokens, _ = shape
    block, kernel = step.block, step.kernel
    if (
        batch * tokens > min(kernel.max_rows, device.MAX_ROWS if is_audit else step.extent.few)
        or tokens > device.MAX_TOKENS
        or hidden.device != kernel.device
        or hidden.dtype is not step.dtype
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.is_autocast_enabled(hidden.device.type)
        or block.layer.training
    ):
        return None
    cache, positions = kwargs.get(block.form.call.cache), kwargs.get("position_embeddings")
    layers = getattr(cache, "layers", ())
    if positions is None or block.index >= len(layers):
        return None
    layer = layers[block.index]
    if not is_static(layer) or not (is_audit or step.is_current()):
        return None
    cos, sin = positions if block.form.angles.is_plain else step.turned(positions)
    if cos.dtype is not step.dtype or cos.shape[-2] != tokens or not _fits(layer, batch, step):
        return None
    output = kernel(hidden.contiguous(), cos, sin, layer)
    return with_feed_forward(block, *output) if isinstance(output, tuple) else output


def is_static(layer: Any) -> bool:
    """Return whether a cache layer is a `hf_accel.core.calls.cache_layers.StaticLayer`."""
    return isinstance(getattr(layer, "lengths", None), torch.Tensor) and isinstance(
        getattr(layer, "starts", None), torch.Tensor
    )


def _fits(layer: Any, batch: int, step: BlockStep) -> bool:
    keys, values, block = layer.keys, layer.values, step.block
    shape = (batch, block.kv_heads)
    return (
        layer.bits in (None, 8, 4)
        and keys.shape[:2] == values.shape[:2] == shape
        and keys.dtype == values.dtype == (step.dtype if layer.bits is None else torch.uint8)
        and (layer.bits is not None or keys.shape[3] == values.shape[3] == block.head_dim)
    )


class _ProbeLayer:
    """An empty layer of a static cache for two rows, of which the first begins with padding."""

    bits = None
    sliding_window = None

    def __init__(self, like: Any, tokens: int) -> None:
        shape = (2, like.kv_heads, tokens, like.head_dim)
        weight = next(like.layer.parameters())
        self.keys, self.values = (torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in "kv")
        self.lengths = torch.zeros(2, dtype=torch.int32, device=weight.device)
        self.starts = torch.tensor([1, 0], dtype=torch.int32, device=weight.device)


class ProbeCache:
    """A static cache of one layer that a replacement under audit writes into."""

    def __init__(self, block: Any, tokens: int) -> None:
        self.layers = [None] * block.index + [_ProbeLayer(block, tokens)]
