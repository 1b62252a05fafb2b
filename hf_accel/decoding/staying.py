"""In which calls rows that have ended stay until the last one ends: where somebody could see them leave."""

from __future__ import annotations

from transformers.generation.stopping_criteria import MaxTimeCriteria

from hf_accel.core.calls.call import Call
from hf_accel.core.calls.following import following_positions
from hf_accel.core.model.onlookers import onlooker
from hf_accel.decoding.arrival import REPEATABLE
from hf_accel.decoding.processors import processor_obstacle

CRITERIA = REPEATABLE | {MaxTimeCriteria}  # look at each row by itself, or at none


def call_obstacle(call: Call) -> str | None:
    """Return why the rows of a call stay until it ends, whatever its cache; None if nobody would see them leave."""
    if call.generation_config.return_dict_in_generate:
        return "what passes return of all rows is asked for"
    if call.has_callers_cache:
        return "the cache is the caller's"
    if call.model.training:
        return "the model is in training mode, where dropout draws for all rows"
    if other := next((type(each).__name__ for each in call.stopping_criteria if type(each) not in CRITERIA), None):
        return f"{other} may look at more than the tokens of a row"
    reason = processor_obstacle(call.logits_processor) or _rope_obstacle(call)
    return reason or onlooker(call.model, len(call.input_ids))


def _rope_obstacle(call: Call) -> str | None:
    """Return why the largest position of the batch matters: it is that of a row that may leave."""
    if call.rope is None:
        return None
    rows, tokens = call.input_ids.shape
    positions = following_positions(call.model_kwargs, rows)
    first, last = (tokens, tokens) if positions is None else (int(positions.min()), int(positions.max()))
    stop = last + int(call.generation_config.max_length) - tokens
    return None if call.rope.is_steady(first, stop) else str(call.rope)
