"""The native step of one mixer, and the check at every token that it still stands for the module.

Weights that were moved or exchanged for others that fit are followed, and so are projections, which are called as the
modules they are; after any other change the mixer runs its own forward. What is looked at is in `core.model.watching`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from hf_accel.core.calls.call import request_in_progress
from hf_accel.core.drift import MIXER_CACHES
from hf_accel.core.journal import beneath
from hf_accel.core.model.watching import Surroundings, Watch
from hf_accel.recurrent.forms import Form

# attributes that may change while the step stays right: wrappers such as accelerate's call the forward of the class
_FOLLOWED = frozenset({"config", "forward", "_hf_hook", "_old_forward"})
# sequences packed into one row: their forwards begin states anew within it
_PACKED = ("cu_seq_lens_q", "seq_idx")


class States(NamedTuple):
    """What a cache layer holds: conv [B, channels, taps]; recurrent fp32 [B, H, ...], None where there is none."""

    conv: Tensor
    recurrent: Tensor | None


def cache_keyword(module: Any) -> str:
    """Return the keyword by which a mixer's forward takes the cache, an empty one where it takes none."""
    names = inspect.signature(module.forward).parameters
    return next((name for name in MIXER_CACHES if name in names), "")


def held_states(module: Any, cache: Any) -> States | None:
    """Return the states of a mixer that one more token joins in place, None where stock would not do so."""
    index = module.layer_idx
    layers = getattr(cache, "layers", ())
    if getattr(cache, "offloading", True) or index >= len(layers) or not isinstance(cache, Cache):
        return None
    layer = layers[index]
    if (
        not isinstance(layer, LinearAttentionCacheLayerMixin)
        or type(layer).update_recurrent_state is not LinearAttentionLayer.update_recurrent_state
        or type(cache).get_conv_state is not Cache.get_conv_state
        or layer.number_of_states != 1
        or layer.record_past
        or not layer.has_previous_state[0]
    ):
        return None
    conv = layer.conv_states[0]
    return None if conv is None else States(conv, layer.recurrent_states[0])


def _hides(mask: Any) -> bool:
    """Return whether a mask [B, 1] of a token may hide it in a row; most models give none with a single token."""
    return mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2 and bool((mask == 1).all()))


class MixerStep:
    """The step of one mixer. index: of the layer, which goes up within a pass."""

    def __init__(self, module: Any, form: Form, index: int, surroundings: Surroundings) -> None:
        """Raise ValueError with the reason if there is no such step over the module's tensors."""
        self.form, self.index, self.surroundings = form, index, surroundings
        self._keyword = cache_keyword(module)
        self._refused: Watch | None = None
        self._build(module)

    def _build(self, module: Any) -> None:
        self._step = self.form.built(module)
        self.watch = Watch(module, self.form.read(module))
        self._request = 0  # the call of `generate` in which everything was looked at

    def output(self, module: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """Return what the mixer returns for hidden [B, 1, E], its states moved; None if the step does not cover it."""
        if (
            type(hidden) is not Tensor
            or hidden.dim() != 3
            or hidden.shape[1] != 1
            or not hidden.is_cpu
            or _hides(kwargs.get("attention_mask"))
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or torch.is_autocast_enabled("cpu")
            or any(kwargs.get(name) is not None for name in _PACKED)
        ):
            return None
        states = held_states(module, kwargs.get(self._keyword))
        if states is None or states.conv.shape[0] != hidden.shape[0] or not self.is_current(module):
            return None
        return self._step(module, hidden, *states)

    def is_current(self, module: Any) -> bool:
        """Return whether the step still stands for the module, having followed what may change."""
        request = request_in_progress()
        if request is not None and request.number == self._request and self.watch.is_in_place():
            return not self.surroundings.changed
        self._request = 0
        if not self._is_current(module):
            return False
        if request is not None:
            self._request = request.number
        return True

    def _is_current(self, module: Any) -> bool:
        if not self.surroundings.hold(self.index) or self.watch.is_hooked():
            return False
        return self.watch.is_same() or self._follow(module)

    def _follow(self, module: Any) -> bool:
        """Take over weights that moved and projections that were exchanged; remember what does not fit."""
        if self._refused is not None and self._refused.is_same():
            return False
        with suppress(ValueError, AttributeError, TypeError, KeyError, RuntimeError):
            if self.watch.is_same_but(_FOLLOWED, frozenset(), self.form.called):
                self._build(module)
                return True
        self._refused = None
        with suppress(RuntimeError, KeyError, AttributeError):  # tensors without memory are looked at again
            self._refused = Watch(module, self.form.read(module))
        return False


class NativeMixer:
    """Marks mixers whose `forward` is a `native_forward`."""

    step: MixerStep


def native_forward(step: MixerStep, original: type) -> Callable[..., Any]:
    """Return the `forward` of a mixer: a token over states natively, all else as the class it is mixed over does."""

    @functools.wraps(original.forward)  # type: ignore[attr-defined]
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = None if args else step.output(self, hidden_states, kwargs)
        return beneath(NativeMixer, self, "forward")(hidden_states, *args, **kwargs) if result is None else result

    return forward
