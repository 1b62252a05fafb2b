"""What a model asks of attention, found out by a forward pass of a few tokens in which every layer's call is noted.

Each call is also compared with the reference: a model whose own attention computes something else than its arguments
say keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hf_accel.attention.question import Question, Visible, question_of
from hf_accel.core.model.modes import evaluating
from hf_accel.core.model.shadow import twin
from hf_accel.ops import tolerances
from hf_accel.ops.tiled import tiled_attention

TOKENS = 3
NAME = "_attn_implementation_internal"  # the back end's name, in the values of a config


@dataclass(frozen=True)
class Demand:
    """One kind of call that a model makes, and a module that makes it."""

    question: Question
    module: Any = field(compare=False)


class Probe:
    """Stands for a ladder in a pass that only looks, and has stock's attention answer."""

    is_probe = True
    takes_bands = True
    reads_grouped = False

    def __init__(self) -> None:
        self.demands: dict[Demand, None] = {}
        self.worst = 0.0

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        visible: Visible,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
        stock: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """Note the call, compare stock's attention with the reference, and return it."""
        question = question_of(query, key, value, visible, softcap, sinks)
        window = None if visible.band is None else visible.band.window  # longer than the few tokens of the pass
        question = replace(question, window=window)
        self.demands[Demand(question, module)] = None
        output = stock()
        expected, _ = tiled_attention(
            *(x.double() for x in (query, key, value)), scale=scale, is_causal=visible.is_causal, window=visible.window,
            starts=None if visible.band is None else visible.band.starts_tensor,
            mask=None if visible.mask is None else visible.mask if visible.mask.dtype is torch.bool
            else visible.mask.double(), softcap=softcap, sinks=None if sinks is None else sinks.double(),
        )  # fmt: skip
        last = (output[:, -1].double() - expected.transpose(1, 2)[:, -1]).norm()
        self.worst = max(self.worst, float(last / expected[:, :, -1].norm()))
        return output


def demands_of(model: Any, name: Callable[[Probe], str]) -> list[Demand] | str:
    """Return the kinds of calls that a model makes, or why its attention cannot be replaced.

    name: returns the name of a back end that asks a probe.
    """
    probe, copied = Probe(), twin(model)
    configs = {id(config): config for module in copied.modules() if (config := vars(module).get("config")) is not None}
    before = {number: vars(config).get(NAME) for number, config in configs.items()}
    for config in configs.values():
        vars(config)[NAME] = name(probe)
    ids = torch.ones((2, TOKENS), dtype=torch.long, device=model.device)
    ids[:, 1:] = torch.arange(2, 2 + 2 * (TOKENS - 1), device=model.device).view(2, -1) % ids_of(copied)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    try:
        with evaluating(copied), torch.no_grad():
            copied(input_ids=ids, attention_mask=mask, use_cache=True)
    finally:
        for number, config in configs.items():
            vars(config)[NAME] = before[number]
    if not probe.demands:
        return "its layers do not ask transformers' registry for their attention."
    bound = tolerances.of_attention(model.dtype)
    if not probe.worst <= bound:
        return f"its own attention differs from what it asks for by {probe.worst:.1e}; rounding explains {bound:.0e}."
    return list(probe.demands)


def ids_of(model: Any) -> int:
    """Return how many token ids a model knows."""
    return int(model.get_input_embeddings().weight.shape[0])
