"""Sampling by selection: the tokens and the state of the generator that processors and `torch.multinomial` leave.

transformers sorts a whole vocabulary for top-p, and `torch.multinomial` makes an exponential of every token and looks
at few of them. One native call selects the tokens that stay and makes the exponentials of these; the generator passes
over the others. Where it cannot tell what stock's rounding or its sort of equal scores makes of a choice, `selected`
returns None, and the processors themselves are asked. Cost for 128 thousand scores and top-k: a tenth of a millisecond.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation import logits_process as stock

from hf_accel.decoding.draws import random_state, set_random_state
from hf_accel.kernels import native
from hf_accel.kernels.native import Rules

# what is served, in this order: the attribute that says how, as the rule is called, and from where to where it may be
_SERVED = {
    stock.RepetitionPenaltyLogitsProcessor: ("penalty", 1e-30, 1e30),
    stock.TemperatureLogitsWarper: ("temperature", 1e-30, 1e30),
    stock.TopKLogitsWarper: ("top_k", 1, 2**31),
    stock.TopPLogitsWarper: ("top_p", 0, 1),
    stock.MinPLogitsWarper: ("min_p", 0, 1),
}
_ORDER: dict[type, int] = {kind: place for place, kind in enumerate(_SERVED)}
_CPU = torch.device("cpu")
_turn = threading.Lock()  # two texts at once must not make the same draws


def rules_of(processors: Any) -> Rules | None:
    """Return what the processors do where native choosing does just that, else None."""
    found: dict[str, Any] = {}
    before = -1
    for processor in processors:
        place = _ORDER.get(type(processor), -1)
        if place <= before:
            return None
        before = place
        rule, least, most = _SERVED[type(processor)]
        value, filtered = getattr(processor, rule), getattr(processor, "filter_value", -math.inf)
        is_least = rule == "top_k" or getattr(processor, "min_tokens_to_keep", 1) == 1  # of top-k the k has it already
        is_number = type(value) is int or (type(value) is float and rule != "top_k")
        if not is_number or not least <= value <= most or filtered != -math.inf or not is_least:
            return None
        found[rule] = value
    return Rules(**found)


def selected(logits: torch.Tensor, input_ids: torch.Tensor, processors: Any, samples: bool) -> torch.Tensor | None:
    """Return the tokens [B] that stock would choose from logits [B, V] after input_ids [B, S]; None: ask it."""
    rules = rules_of(processors)
    if rules is None or not _is_served(logits, input_ids) or not (samples or rules == Rules(penalty=rules.penalty)):
        return None
    ids, starts = None, None
    if rules.penalty is not None:
        ids, starts = input_ids.contiguous(), _starts(processors[0].prompt_ignore_length, len(input_ids))
        if starts is None:
            return None
    if not samples:
        return native.choose(logits, ids, starts, rules, None)
    if not _draws_are_known(logits.numel(), native.status().path):
        return None
    with _turn:
        state = random_state(_CPU)
        tokens = native.choose(logits, ids, starts, rules, state)
        if tokens is not None:
            set_random_state(state, _CPU)
    return tokens


def _is_served(logits: torch.Tensor, input_ids: torch.Tensor) -> bool:
    is_plain = type(logits) is torch.Tensor and logits.is_cpu and input_ids.is_cpu and logits.dtype in native.DTYPES
    is_whole = logits.dim() == 2 and logits.stride(1) == 1 and len(logits) > 0 and not logits.requires_grad
    is_whole = is_whole and 0 < logits.shape[1] <= 1 << 24  # of more, torch draws none
    return is_plain and is_whole and input_ids.dtype is torch.int64 and native.is_available()


def _starts(ignored: Any, rows: int) -> Sequence[int] | None:
    """Return from which token on the penalty is for each row; None: stock refuses what it is told."""
    found = ignored.tolist() if isinstance(ignored, torch.Tensor) else [ignored or 0] * rows
    return [max(0, start) for start in found] if len(found) == rows else None


@functools.lru_cache(maxsize=64)
def _draws_are_known(count: int, library: str | None) -> bool:
    """Return whether this torch draws so many exponentials as the native library does: builds with others may come."""
    generator = torch.Generator().manual_seed(count)
    state = generator.get_state()
    expected = torch.empty(count).exponential_(1, generator=generator)
    try:
        return torch.equal(native.exponentials(state, count), expected) and torch.equal(state, generator.get_state())
    except ValueError:
        return False
