"""Fields that are not served: refused where they would change the result, accepted where they say nothing."""

from __future__ import annotations

from typing import Any

from hf_accel.endpoint.errors import Refusal

# fields that no answer depends on: whose request it is, and where it is counted
_OF_BOOKKEEPING = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})
# what each field may say because it asks for what is done anyhow
_AS_IS: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none",),
    "function_call": ("none",),
    "parallel_tool_calls": (False,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
}
_REASONS = {
    "tools": "tool calls are not served",
    "functions": "tool calls are not served",
    "response_format": "text is not constrained to a format",
    "audio": "there is no audio",
    "echo": "the prompt is not returned; put it before the text yourself",
    "best_of": "no more texts are written than are returned; use n",
    "suffix": "text is written at the end of the prompt only",
}


def check_served(body: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """Return the fields of a request that say something and are known.

    Raises:
        Refusal: a field asks for what is not served, or is unknown.
    """
    found = {}
    for name, value in body.items():
        if name in known:
            found[name] = value
            continue
        if value is None or name in _OF_BOOKKEEPING or any(_is_same(value, one) for one in _AS_IS.get(name, ())):
            continue
        reason = _REASONS.get(
            name, "the field is not known here" if name not in _AS_IS else "only its default is served"
        )
        raise Refusal(f"{name}: {reason}. Leave it out.", param=name, code="unsupported_parameter")
    return found


def _is_same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and value == other
