"""Whether the native step of a mixer is faster than its own forward: a short trial per form, without projections.

Both call the projections alike, which take most of the time and would hide what differs: the modules give recorded rows
here. Cost: ROUNDS tokens of one mixer each way, once per process and form.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionLayer

from hf_accel.core.model.watching import Surroundings
from hf_accel.kernels import native
from hf_accel.recurrent.audit import Audited
from hf_accel.recurrent.forms import Form
from hf_accel.recurrent.step import MixerStep, States, cache_keyword

ROUNDS = 12
MARGIN = 0.9  # of the time of the mixer's own forward: less is a gain that noise cannot have made
_known: dict[Any, float] = {}


class _Recorded(nn.Module):
    """Stands for a module and returns what that returned."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, *_: Any) -> Tensor:
        return self.rows


def share_of_time(mixer: Audited, form: Form) -> float:
    """Return the native step's time as a share of that of the mixer's own forward, both without projections.

    The mixer lies on a copy of the model, and its projections are not used afterwards.
    """
    key = (form, type(mixer.module), native.status().isa, torch.get_num_threads())
    if key not in _known:
        _known[key] = _measured(mixer, form)
    return _known[key]


@torch.no_grad()
def _measured(mixer: Audited, form: Form) -> float:
    if mixer.seen is None:
        return float("inf")
    module, (hidden, states) = mixer.module, mixer.seen
    hidden = hidden[1:].contiguous()
    cache = _cache_of(module.layer_idx, States(*(None if s is None else s[1:] for s in states)))  # type: ignore[arg-type]
    kwargs = {cache_keyword(module): cache, "attention_mask": None}
    _record_projections(module, form, hidden, kwargs)
    step = MixerStep(module, form, 0, Surroundings([module, *form.read(module)]))
    own = ours = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        module(hidden, **kwargs)
        middle = time.perf_counter()
        is_served = step.output(module, hidden, kwargs) is not None
        stop = time.perf_counter()
        if not is_served:
            return float("inf")
        own, ours = min(own, middle - start), min(ours, stop - middle)
    return ours / own


def _cache_of(index: int, states: States) -> Cache:
    layer = LinearAttentionLayer()
    layer.update_conv_state(states.conv)
    if states.recurrent is not None:
        layer.update_recurrent_state(states.recurrent)
    return Cache(layers=[*(LinearAttentionLayer() for _ in range(index)), layer])


def _record_projections(module: Any, form: Form, hidden: Tensor, kwargs: dict[str, Any]) -> None:
    """Replace the modules that the mixer calls by what they return for these hidden states."""
    rows: dict[str, Tensor] = {}
    hooks = [
        module._modules[name].register_forward_hook(lambda _, __, output, name=name: rows.__setitem__(name, output))
        for name in form.called
    ]
    module(hidden, **kwargs)
    for hook in hooks:
        hook.remove()
    for name, output in rows.items():
        module._modules[name] = _Recorded(output.clone())
