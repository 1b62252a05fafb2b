"""The native call of a decoder layer, and the check at every step that it still stands for the layer.

Weights that were moved or exchanged for others that fit are followed; after any other change the layer runs its own
forward. What is looked at is in `core.model.watching`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import nn

from hf_accel.core.calls.call import request_in_progress
from hf_accel.core.model.back_ends import BACK_ENDS, Masks, masks_of
from hf_accel.core.model.blocks import DecoderBlock, LinearSlice
from hf_accel.core.model.watching import Surroundings, Watch
from hf_accel.kernels import native
from hf_accel.kernels.weights import PackedProduct
from hf_accel.layers.trial import Extent

_NAME = "_attn_implementation_internal"  # the back end's name, in the values of a config
# attributes that may change while the native call stays right: only training reads them, or they are read anew
FOLLOWED = frozenset(
    {"config", "_packed", "attention_dropout", "gradient_checkpointing", "_gradient_checkpointing_func"}
)
# of the layer itself also these: wrappers such as accelerate's, which go on calling the forward of its class
OF_THE_LAYER = frozenset({"forward", "_hf_hook", "_old_forward"})


class BlockStep:
    """The call of one layer, and the check that it still stands for the layer.

    make: builds the call from the layer's shape and weights.
    """

    def __init__(
        self,
        block: DecoderBlock,
        extent: Extent,
        surroundings: Surroundings,
        make: Callable[[native.BlockShape, native.BlockWeights], Any] = native.NativeBlock,
    ) -> None:
        self._make, self.extent = make, extent
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
            if not isinstance(module, nn.Linear):
                raise ValueError(f"a {type(module).__name__} is no product that runs natively")
            return native.Projection(module.weight.detach()[part.start : part.stop], bias)

        kind = "rms_unit" if block.norm_style == "gemma" else "rms"
        parts: dict[str, Any] = {
            name: projection(part)
            for name in ("q", "k", "v", "o", "gate", "up", "down")
            if (part := getattr(block, name)) is not None
        }
        norms: dict[str, Any] = {
            f"{name}_norm": native.Norm(kind=kind, eps=block.norm_eps, weight=module.weight.detach())
            for name in ("input", "mlp", "attention_out", "mlp_out", "q", "k")
            if (module := getattr(block, f"{name}_norm")) is not None
        }
        shape = native.BlockShape(
            hidden=parts["o"].weight.shape[0],
            heads=block.heads,
            kv_heads=block.kv_heads,
            head_dim=block.head_dim,
            inner=parts["gate"].weight.shape[0] if block.gate else 0,
            activation=block.activation,
            scale=block.scale,
            softcap=block.softcap,
            norm_extent="row" if block.norms_rows else "head",
            residual_scale=block.residual_scale,
            part="layer" if block.gate else "half",
            **native.heads_in_order(block.heads, block.kv_heads, block.head_dim),
        )
        parts["projections"] = tuple(parts.pop(name) for name in "qkv")
        kernel = self._make(shape, native.BlockWeights(**parts, **norms))
        self.watch = Watch(block.layer, block.modules)
        self._refused: Watch | None = None
        self._request = 0  # the call of `generate` in which everything was looked at
        self.kernel, self.dtype = kernel, kernel.dtype
        self._attention = vars(block.attention)
        self._config = self._attention.get("config")
        self._config_values: dict[str, Any] = {}
        self._attention_name: Any = None

    @property
    def shape(self) -> tuple[Any, ...]:
        """What the time of the layer depends on, natively and by its own forward."""
        schemes = [getattr(p.weight, "scheme", None) for p in self.kernel.weights.products.values()]
        attention = getattr(self._attention.get("config"), _NAME, None)
        return self.kernel.shape, self.dtype, type(self.block.layer), attention, *schemes

    @property
    def masks(self) -> Masks | None:
        """The form of the masks that the layer is given, None if its attention is not known."""
        return masks_of(getattr(self._attention.get("config"), _NAME, ""))

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
        self._attention_name = values.get(_NAME)
        back_end = BACK_ENDS.get(self._attention_name)
        if (
            back_end is None
            or back_end.masks is None
            or (block.softcap is not None and not back_end.soft_caps)
            or values.get("num_attention_heads") != block.heads  # read at every call where q, k and v are one product
            or not self.surroundings.hold(block.index)
            or self.watch.is_hooked()
        ):
            return False
        # another config is not compared: configs are equal by their values, of which there are many
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
