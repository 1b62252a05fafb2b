"""Whether a call is decoded with drafts, and if it is not, why."""

from __future__ import annotations

from typing import Any

from hf_accel.core.calls.call import Call
from hf_accel.core.calls.doors import Door
from hf_accel.core.calls.drafting import Speculation
from hf_accel.core.calls.following import Following, following, following_positions
from hf_accel.core.calls.rollback import rollback_obstacle, stop_recording
from hf_accel.core.drift import CACHE
from hf_accel.core.model.support import foreign_inputs
from hf_accel.decoding.ends import Ends
from hf_accel.decoding.processors import processor_obstacle
from hf_accel.decoding.steps import PlainSteps, Steps
from hf_accel.decoding.verification import VerifiedSteps, stepper_of

NO_POSITIONS = "the model takes no positions, so rows cannot be apart"


def speculation_of(call: Call) -> Speculation | None:
    """Return what speculates in this call, None for plain decoding; before the prompt is run."""
    speculation: Speculation | None = call.doors.get(Door.DRAFTS)
    if speculation is None:
        return None
    reason = obstacle_before_prompt(call) or speculation.obstacle(call)
    if reason is None:
        return speculation
    speculation.skip(reason)
    return None


def steps_of(call: Call, speculation: Speculation | None, outputs: Any) -> Steps:
    """Return where the call gets its tokens from, now that its prompt has run with these outputs."""
    if speculation is None:
        return PlainSteps(call, outputs)
    found = inputs_after_prompt(call, outputs)
    reason = found if isinstance(found, str) else None
    if isinstance(found, Following):
        reason = speculation.obstacle_of(call, found, stepper_of(call, found), outputs.logits[:, -1:])
        if reason is None:
            return VerifiedSteps(call, speculation, outputs, found)
    speculation.skip(str(reason))
    if not call.has_callers_cache:  # whose windows may record for reasons of the caller's
        stop_recording(call.model_kwargs[CACHE].layers)
    return PlainSteps(call, outputs)


def obstacle_before_prompt(call: Call) -> str | None:
    """Return why a call is decoded one token at a time, None if drafts can be verified as far as is known yet."""
    config, cache, batch = call.generation_config, call.model_kwargs.get(CACHE), call.input_ids.shape[0]
    if config.max_length is not None and config.max_length <= call.input_ids.shape[1] + 1:
        return "a single token is asked for"
    if config.is_assistant:
        return "the model drafts for another one"
    if call.model.training:
        return "the model is in training mode, where dropout draws at every step"
    if cache is None or not call.model_kwargs.get("use_cache"):
        return "there is no cache"
    if call.model_kwargs.get("inputs_embeds") is not None or not call.input_ids.shape[1]:
        return "the prompt is not made of tokens"
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        return "attentions or hidden states are asked for"
    if batch > 1 and (config.return_dict_in_generate or call.has_callers_cache):
        return "the cache of a batch is the caller's"
    if batch > 1 and call.model_kwargs.get("position_ids") is None:
        return NO_POSITIONS
    return processor_obstacle(call.logits_processor) or _rope_obstacle(call)


def _rope_obstacle(call: Call) -> str | None:
    """Return why the positions of this call leave no steps of several tokens that equal single ones."""
    rope = call.rope
    if rope is None:
        return None
    batch, prompt_tokens = call.input_ids.shape
    positions = following_positions(call.model_kwargs, batch)
    first = prompt_tokens if positions is None else int(positions.max())
    stop = first + Ends(call).maximum - prompt_tokens - 1  # the last token is not taken in
    if rope.beyond is not None and first >= rope.beyond:
        return f"{rope} at every token from {rope.beyond} on"
    if batch > 1 and not rope.is_steady(first, stop):
        # frequencies follow the row that is furthest, so rows apart would change one another's
        return f"{rope}, and those of the batch change before it ends"
    return None


def inputs_after_prompt(call: Call, outputs: Any) -> Following | str:
    """Return the inputs of verified steps now that the prompt has run, or why the call must go on plainly."""
    if reason := foreign_inputs(call.model):
        return reason
    cache, batch = call.model_kwargs[CACHE], call.input_ids.shape[0]
    if reason := rollback_obstacle(cache, batch > 1):
        return reason
    found = following(call.model, call.model_kwargs, outputs, call.input_ids, Ends(call).maximum - 1)
    if isinstance(found, Following):
        if not _holds(cache, call.input_ids.shape[1], call.has_callers_cache):
            return "the cache does not hold the prompt's tokens"
        if batch > 1 and found.positions is None:
            return NO_POSITIONS
        if batch > 1 and found.last is not None:
            return "the model's inputs change before the batch ends"
    return found


def _holds(cache: Any, tokens: int, is_callers: bool) -> bool:
    """Return whether a cache holds so many tokens; recurrent states alone do not tell, but they began empty."""
    try:
        return bool(cache.get_seq_length() == tokens)
    except ValueError:
        return not is_callers
