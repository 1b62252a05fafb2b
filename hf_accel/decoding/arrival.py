"""What a step sends from the device to the host, and how late it may be looked at."""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

from hf_accel.core.calls.call import Call
from hf_accel.core.calls.recurrent import is_recurrent
from hf_accel.core.calls.rollback import rollback_obstacle
from hf_accel.core.drift import CACHE
from hf_accel.decoding.processors import processor_obstacle

ASYNCHRONOUS = frozenset({"cuda"})  # types of devices that run behind the host
REPEATABLE = frozenset({MaxLengthCriteria, EosTokenCriteria, StopStringCriteria})  # may look at one text too many


class Arrival:
    """The tokens [B] of a step, where somebody wants them, and whether the text is done: on their way to the host.

    device: where the step runs. is_done: on the device, or known to the host. unfinished: [B], where it is asked for.
    """

    def __init__(
        self,
        device: torch.device,
        tokens: torch.Tensor | None,
        is_done: torch.Tensor | bool,
        unfinished: torch.Tensor | None = None,
    ) -> None:
        self._tokens, self._is_done, self._event, self._unfinished = tokens, is_done, None, unfinished
        if device.type == "cuda":
            if isinstance(is_done, torch.Tensor):
                self._is_done = _sent(is_done)
            self._tokens = None if tokens is None else _sent(tokens)
            self._unfinished = None if unfinished is None else _sent(unfinished)
            self._event = torch.cuda.Event()
            # of the tokens' device, which need not be the current one
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Wait until the device has done what was queued before."""
        if self._event is not None:
            self._event.synchronize()

    def get(self) -> tuple[Any, bool]:
        """Wait for them, and return tokens on the CPU, None where nobody wants them, and whether the text is done."""
        self.wait()
        return None if self._tokens is None else self._tokens.cpu(), bool(self._is_done)

    def ended(self) -> set[int]:
        """Return the rows that have ended, after `get`."""
        unfinished = [] if self._unfinished is None else self._unfinished.tolist()
        return {row for row, goes_on in enumerate(unfinished) if not goes_on}


def _sent(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def lag_of(call: Call) -> int:
    """Return how many plain steps of a call may be made before it is known that the text was done before them.

    One on a device that runs behind the host, where a step too many leaves no trace: in processors and criteria of the
    user's, or in a cache that somebody gets back and that cannot drop its last token.
    """
    config, cache = call.generation_config, call.model_kwargs.get(CACHE)
    is_kept = config.return_dict_in_generate or call.has_callers_cache or cache is None
    if (
        call.input_ids.device.type not in ASYNCHRONOUS
        or any(type(criterion) not in REPEATABLE for criterion in call.stopping_criteria)
        or processor_obstacle(call.logits_processor) is not None
        or (is_kept and not (cache is not None and can_drop_tokens(cache)))
    ):
        return 0
    return 1


def is_plainly_greedy(call: Call) -> bool:
    """Return whether each token is the best of the logits as they are, and is what the model is given next.

    Not so where scores are kept, or rows that have ended are given padding.
    """
    config = call.generation_config
    pads = call.input_ids.shape[0] > 1 and any(hasattr(each, "eos_token_id") for each in call.stopping_criteria)
    return not (config.do_sample or config.return_dict_in_generate or call.logits_processor or pads)


def can_drop_tokens(cache: Any) -> bool:
    """Return whether a cache can drop its last tokens, without having been told before that it may have to."""
    is_bound = any(is_recurrent(layer) or getattr(layer, "is_sliding", False) for layer in cache.layers)
    return not is_bound and rollback_obstacle(cache, False) is None
