"""Our own keywords of `generate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_accel.core.calls.doors import Decoder

pass


# our own keywords of `generate`: name -> what the token loop finds in `Call.options`, given the model, the value and
# all other arguments; an error raised there reaches the caller before anything runs
KEYWORDS: dict[str, Callable[[Any, Any, dict[str, Any]], Any]] = {}


# what writes the text of calls that need a token loop of ours, on a model that was optimised without one: keyword ->
# maker of the loop; a keyword of ours is understood whatever was found to pay
LOOPS: dict[str, Callable[[], Decoder]] = {}
