"""A whole decoder layer in one native call, for steps of a few rows.

Stock spends about 160 µs of Python and dispatch per layer and token (twenty operators); one call spends one. The
weights stay where they are. The call does what the layer's own forward does, operation by operation and rounding by
rounding; a layer is only replaced after both gave the same result here (`audit`), and any call that is not a
plain decoding step (hooks, gradients, adapters, foreign caches, more rows) goes to the layer's own forward.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from hf_accel.core.calls.call import request_in_progress
from hf_accel.core.config import Config
from hf_accel.core.drift import CACHE
from hf_accel.core.journal import Journal, beneath, subclass
from hf_accel.core.model.anatomy import Anatomy
from hf_accel.core.model.blocks import DecoderBlock, LinearSlice
from hf_accel.core.model.modes import evaluating
from hf_accel.core.model.watching import ATTENTIONS, Surroundings, Watch
from hf_accel.core.steps.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.kernels import native
from hf_accel.kernels.packed import PackedProduct
from hf_accel.layers.audit import Audit
from hf_accel.layers.linear import native_obstacles
from hf_accel.ops import tolerances

ATTENTION = frozenset(ATTENTIONS)  # whose masks the native call understands and whose mathematics it does
_NAME = "_attn_implementation_internal"
# attributes that may change without an end to the native call: only training reads them, or they are read anew;
# `forward` and accelerate's hooks stand before a layer's own forward, which is what the call is made for
FOLLOWED = frozenset(
    {"config", "_packed", "attention_dropout", "gradient_checkpointing", "_gradient_checkpointing_func"}
)
OF_THE_LAYER = frozenset({"forward", "_hf_hook", "_old_forward"})


@dataclass(frozen=True, kw_only=True)
class DecoderBlockConfig(Config):
    """Decoder layers in one native call each, where the architecture is described.

    max_rows: steps of up to this many rows (batch x query tokens), 1 to 32; larger ones run the layer's own forward.
        None: 16, or 32 where products of many rows are made natively, see `NativeLinearConfig`.
    """

    max_rows: int | None = None

    def __post_init__(self) -> None:
        if self.max_rows is not None:
            self.check_integer("max_rows", 1, native.MAX_ROWS)


class DecoderBlockPatcher(Patcher[DecoderBlockConfig], config=DecoderBlockConfig):
    stage = Stage.ATTENTION
    fidelity = Fidelity.EXACT
    occupies = "decoder layers"

    def obstacles(self, anatomy: Anatomy) -> list[str]:
        found = native_obstacles(anatomy)
        if not anatomy.blocks:
            found.append(f"{anatomy.blocks_missing}.")
        return found

    def patch(self, anatomy: Anatomy, journal: Journal) -> Change:
        left_out = list(anatomy.odd_layers)
        most = self.config.max_rows or native.best_rows(anatomy.dtype) or native.MAX_ROWS
        count = 0
        with evaluating(anatomy.model):
            audit = Audit(anatomy)
            surroundings = Surroundings(m for block in anatomy.blocks for m in (block.layer, *block.modules))
            for block in anatomy.blocks:
                try:
                    step = BlockStep(block, most, surroundings)
                except ValueError as error:  # packed weights cannot be taken apart everywhere
                    left_out.append(f"layer {block.index} runs as it is: {error}")
                    continue
                audit.check(block, partial(native_step, step, is_audit=True), _bound(block, anatomy.dtype))
                if step.watch.is_hooked():
                    left_out.append(f"layer {block.index} is hooked, and runs as it is as long as it is")
                journal.swap_class(block.layer, subclass(NativeLayer, type(block.layer), step=step))
                count += 1
        summary = f"{count} decoder layers run in one native call for up to {most} rows"
        return Change(summary, left_out=tuple(left_out))


def _bound(block: DecoderBlock, dtype: torch.dtype) -> float:
    is_packed = any(isinstance(module, PackedProduct) for module in block.modules)
    return tolerances.of_layer_output(dtype, is_packed)


class BlockStep:
    """The native call of one layer, and the check that it still stands for the layer."""

    def __init__(self, block: DecoderBlock, max_rows: int, surroundings: Surroundings) -> None:
        self.max_rows = max_rows
        self.surroundings = surroundings
        self.block = block
        self._build()

    def _build(self) -> None:
        block = self.block

        def projection(part: LinearSlice) -> native.Projection:
            module: Any = part.module
            bias = None if module.bias is None else module.bias.detach()[part.start : part.stop]
            if isinstance(module, PackedProduct):
                return native.Projection(module.packed.slice(part.start, part.stop), bias)
            return native.Projection(module.weight.detach()[part.start : part.stop], bias)

        def norm(module: Any) -> torch.Tensor | None:
            return None if module is None else module.weight.detach()

        parts: dict[str, Any] = {
            name: projection(getattr(block, name)) for name in ("q", "k", "v", "o", "gate", "up", "down")
        }
        norms: dict[str, Any] = {f"{name}_norm": norm(getattr(block, f"{name}_norm"))
                 for name in ("input", "mlp", "attention_out", "mlp_out", "q", "k")}  # fmt: skip
        shape = native.BlockShape(
            hidden=parts["o"].weight.shape[0],
            heads=block.heads,
            kv_heads=block.kv_heads,
            head_dim=block.head_dim,
            inner=parts["gate"].weight.shape[0],
            activation=block.activation,
            norm_eps=block.norm_eps,
            norm_style=block.norm_style,
            scale=block.scale,
            softcap=block.softcap,
        )
        kernel = native.NativeBlock(shape, native.BlockWeights(**parts, **norms))
        self.watch = Watch(block.layer, block.modules)
        self._refused: Watch | None = None
        self._request = 0  # the call of `generate` in which everything was looked at
        self.kernel, self.dtype = kernel, kernel.dtype
        self._attention = vars(block.attention)
        self._config = self._attention.get("config")
        self._config_values: dict[str, Any] = {}
        self._attention_name: Any = None

    def is_current(self) -> bool:
        """Return whether the call still stands for the layer, having followed what may change.

        Within a call of `generate` values of attributes, layouts of tensors, classes and functions are looked at once.
        """
        request = request_in_progress()
        if (
            request is not None
            and request.number == self._request
            and self._attention.get("config") is self._config
            and self._config_values.get(_NAME) is self._attention_name
            and self.watch.is_in_place()
        ):
            return not self.surroundings.changed
        self._request = 0
        if not self._is_current():
            return False
        if request is not None:
            self._request = request.number
        return True

    def _is_current(self) -> bool:
        config, block = self._attention.get("config"), self.block
        self._config_values = values = getattr(config, "__dict__", {})
        self._attention_name = attention = values.get(_NAME)
        if (
            attention not in ATTENTION
            or (block.softcap is not None and attention != "eager")  # the others know no soft cap
            or values.get("num_attention_heads") != block.heads  # read at every call where q, k and v are one product
            or not self.surroundings.hold(block.index)
            or self.watch.is_hooked()
        ):
            return False
        # configs are equal by their values, which takes long to find out where one was exchanged for a copy
        if not (config is self._config and self.watch.is_same()) and not self._follow():
            return False
        changed = self.surroundings.changed
        if changed:
            changed.discard(id(self))
        return not changed

    def _follow(self) -> bool:
        """Take over weights that moved (`load_state_dict`, `.data`, `.to`), if they fit; else remember what does not.

        Where a layer was changed in another way, the others run their own forwards, too: the model is stock's to the
        last bit then. Where a module was exchanged, as adapters do, only its layer does.
        """
        if self._refused is not None and self._refused.is_same():
            return False
        try:
            if self.watch.is_same_but(FOLLOWED, OF_THE_LAYER):
                self._build()
                return True
        except (ValueError, AttributeError, TypeError, KeyError, RuntimeError):
            self._refused = None
        if self.watch.has_its_modules():
            self.surroundings.changed.add(id(self))
        with suppress(RuntimeError):  # tensors without memory are looked at again
            self._refused = Watch(self.block.layer, self.block.modules)
        return False


class NativeLayer:
    """`forward` of a decoder layer: plain decoding steps natively, all else as the class it is mixed over does."""

    step: BlockStep

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = None if args else native_step(self.step, hidden_states, kwargs)
        return beneath(NativeLayer, self, "forward")(hidden_states, *args, **kwargs) if result is None else result


def native_step(
    step: BlockStep, hidden: torch.Tensor, kwargs: dict[str, Any], *, is_audit: bool = False
) -> torch.Tensor | None:
    """Return the layer's output [B, T, E], or None if the native call does not cover this step.

    is_audit: the call has just been built; hooks on the layer do not matter.
    """
    if type(hidden) is not torch.Tensor or len(shape := hidden.shape) != 3:
        return None
    batch, tokens, _ = shape
    if (
        batch * tokens > step.max_rows
        or not hidden.is_cpu
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.is_autocast_enabled("cpu")
        or step.block.layer.training
    ):
        return None
    cache, mask = kwargs.get(CACHE), kwargs.get("attention_mask")
    positions = kwargs.get("position_embeddings")
    if cache is None or positions is None or kwargs.get("output_attentions") or getattr(cache, "offloading", True):
        return None
    block = step.block
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= block.index:
            cache.layers.append(cache.layer_class_to_replicate())
    if block.index >= len(cache.layers):  # stock's error
        return None
    layer = cache.layers[block.index]
    reserve = getattr(layer, "reserve", None)
    if reserve is None or not (is_audit or step.is_current()):
        return None
    cos, sin = positions
    if hidden.dtype is not step.dtype or cos.dtype is not step.dtype:
        return None
    reserved = reserve(batch, tokens, block.kv_heads, block.head_dim, hidden.dtype, hidden.device)
    if reserved is None:
        return None
    keys, values, past, first, row_past = reserved
    if mask is None:
        if tokens > 1 and past != first:
            return None
    elif (
        not isinstance(mask, torch.Tensor)
        or mask.dim() != 4
        or mask.shape[1] != 1
        or mask.shape[2] != tokens
        or mask.shape[3] != past + tokens - first
        or mask.dtype not in (torch.bool, hidden.dtype)
    ):
        return None
    bits = getattr(layer, "bits", None)
    output = step.kernel(hidden.contiguous(), cos, sin, keys, values, past, first, mask, row_past, bits)
    if output is not None:  # else nothing was computed, and what was written is written over
        layer.commit(tokens)
    return output
