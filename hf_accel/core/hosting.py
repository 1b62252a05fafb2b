"""Hosting: a generated subclass per model instance through which every `generate` call passes.

`generate` looks its decoding methods up on the class, so an instance attribute `_sample` would be ignored; and a
class of its own for one instance leaves every other model of the architecture alone. Stock `generate` does all
preparation. Only the token loop and the freshly made cache are offered to the patches; with any objection the call
goes on to stock, with every argument intact, and is counted.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from hf_accel.core.drift import CACHE
from hf_accel.core.journal import Journal, beneath, subclass
from hf_accel.core.rope import MovingRope, moving_rope
from hf_accel.errors import ConflictError

if TYPE_CHECKING:
    from hf_accel.core.contracts import Speculation
    from hf_accel.core.report import Report


@dataclass
class Call:
    """The arguments of one decoding loop, as stock `generate` prepared them."""

    model: Any
    input_ids: torch.Tensor  # [B, T]
    logits_processor: Any
    stopping_criteria: Any
    generation_config: Any
    synced_gpus: bool
    streamer: Any
    model_kwargs: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)  # our own keywords, as their owners understood them
    has_callers_cache: bool = False

    @functools.cached_property
    def rope(self) -> MovingRope | None:
        """What moves the rotary embeddings of the model; None: nothing does."""
        return moving_rope(self.model)

    def stock_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments that `_sample` was called with."""
        return {
            "logits_processor": self.logits_processor,
            "stopping_criteria": self.stopping_criteria,
            "generation_config": self.generation_config,
            "synced_gpus": self.synced_gpus,
            "streamer": self.streamer,
            **self.model_kwargs,
        }


class Decoder(Protocol):
    """A token loop: says what it cannot serve, and serves the rest."""

    def objection(self, call: Call) -> str | None: ...

    def run(self, call: Call) -> Any: ...


class CallLog:
    """Counts the `generate` calls of one model: served by our loop, or delegated to stock and why."""

    def __init__(self) -> None:
        self.served = 0
        self.delegated = 0
        self.reasons: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._open = threading.local()

    @contextmanager
    def counting(self) -> Any:
        """Count the `generate` call made inside the block; calls nested in it, and failed ones, do not count."""
        depth = getattr(self._open, "depth", 0)
        self._open.depth = depth + 1
        if depth == 0:
            self._open.reason = "the call did not reach a token loop"
        try:
            yield
        finally:
            self._open.depth = depth
        if depth:
            return
        reason = self._open.reason
        with self._lock:
            if reason:
                self.delegated += 1
                self.reasons[reason] += 1
            else:
                self.served += 1

    def note(self, reason: str) -> None:
        """Remember why the call in progress is delegated; the empty string means it is served."""
        if getattr(self._open, "depth", 0) == 1:
            self._open.reason = reason

    def to_dict(self) -> dict[str, Any]:
        return {"served": self.served, "delegated": self.delegated, "reasons": dict(self.reasons)}


@dataclass
class NewCache:
    """A cache that `generate` has just made for `model`, and what is known of the call that it is for.

    rows: B, with beams and returned sequences; expected_tokens: of the prompt and new ones; mask: [B, T] or None.
    """

    cache: Any
    model: Any
    mode: Any
    rows: int
    expected_tokens: int
    mask: torch.Tensor | None


class Caching(Protocol):
    """What gives caches their layers, and the prompts what is known of them already."""

    def fill(self, new: NewCache) -> None: ...

    def prefilling(
        self, model: Any, input_ids: torch.Tensor, generation_config: Any, kwargs: dict[str, Any], tenant: str | None
    ) -> AbstractContextManager[None]: ...


@dataclass
class Host:
    """What one optimised model carries, beside it and not on it (on it, `deepcopy` and `torch.save` would break)."""

    journal: Journal
    report: Report
    calls: CallLog = field(default_factory=CallLog)
    decoder: Decoder | None = None
    speculation: Speculation | None = None
    caching: Caching | None = None
    prepare_cache: Callable[[Any, int], None] | None = None  # (cache, expected tokens): of draft models
    select_stock_attention: Callable[[], None] | None = None
    draft_model: Any = None
    built: dict[Any, Any] = field(default_factory=dict)  # what calls with a config of their own had built
    lock: Any = field(default_factory=threading.RLock)  # for what calls add to the host


# our own keywords of `generate`: name -> what the token loop finds in `Call.options`, given the model, the value and
# all other arguments; an error raised there reaches the caller before anything runs
KEYWORDS: dict[str, Callable[[Any, Any, dict[str, Any]], Any]] = {}
# what writes the text of calls that need a token loop of ours, on a model that was optimised without one: keyword ->
# maker of the loop; a keyword of ours is understood whatever was found to pay
LOOPS: dict[str, Callable[[], Decoder]] = {}
POSITIONAL = ("inputs", "generation_config")  # arguments of `generate` that are often given without their names


@dataclass
class Request:
    """What only `generate` knows of a call, for the token loop below it."""

    options: dict[str, Any] = field(default_factory=dict)
    has_callers_cache: bool = False
    number: int = field(default_factory=itertools.count(1).__next__)  # which no other has


_request: ContextVar[Request | None] = ContextVar("the hf_accel request in progress", default=None)

request_in_progress: Callable[[], Request | None] = _request.get
"""Return the `generate` call of an optimised model that this thread is in, None outside of one."""

_hosts: WeakKeyDictionary[torch.nn.Module, Host] = WeakKeyDictionary()


def host_of(model: Any) -> Host | None:
    """Return the host of an optimised model, None for any other."""
    return _hosts.get(model)


def open_host(model: PreTrainedModel, host: Host) -> None:
    """Give `model` its class and its host, through the host's journal.

    Raises:
        ConflictError: it has one: another thread has optimised it since this was begun.
    """
    if _hosts.setdefault(model, host) is not host:
        raise ConflictError(
            f"This {type(model).__name__} was optimised by another thread meanwhile. Optimise a model in one place."
        )
    host.journal.did(lambda: _hosts.__delitem__(model))
    host.journal.swap_class(model, subclass(Hosted, type(model)))


def _caching(host: Host) -> Caching | None:
    """Return what makes the caches of the call in progress."""
    request = _request.get()
    return request.options.get("kv_cache", host.caching) if request else host.caching


def _loop_for(call: Call) -> Decoder | None:
    """Return a token loop for a call that asks for what only a loop of ours does."""
    makers = [make for name, make in LOOPS.items() if call.options.get(name)]
    return makers[0]() if makers else None


_MODE_REASONS = {
    GenerationMode.ASSISTED_GENERATION: "assisted generation asked for by the caller",
    GenerationMode.BEAM_SEARCH: "beam search",
    GenerationMode.BEAM_SAMPLE: "beam search with sampling",
}


class Hosted:
    """The methods of an optimised model. Mixed over the model's own class by `open_host`."""

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        host = host_of(self)
        if host is None:
            return beneath(Hosted, self, "generate")(*args, **kwargs)
        own = {name: kwargs.pop(name) for name in list(kwargs) if name in KEYWORDS}
        others = dict(zip(POSITIONAL, args, strict=False)) | kwargs
        token = _request.set(Request({name: KEYWORDS[name](self, value, others) for name, value in own.items()}))
        try:
            with host.calls.counting():
                return beneath(Hosted, self, "generate")(*args, **kwargs)
        finally:
            _request.reset(token)

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        request = _request.get() or Request()
        call = Call(
            self,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            synced_gpus,
            streamer,
            model_kwargs,
            request.options,
            request.has_callers_cache,
        )
        host = host_of(self)
        decoder = None if host is None else host.decoder or _loop_for(call)
        if host is None or decoder is None:
            if host is not None:
                host.calls.note("no token loop of ours is applied")
            return beneath(Hosted, self, "_sample")(input_ids, **call.stock_arguments())
        reason = decoder.objection(call)
        host.calls.note(reason or "")
        if reason:
            return beneath(Hosted, self, "_sample")(input_ids, **call.stock_arguments())
        return decoder.run(call)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        given = model_kwargs.get(CACHE)
        result = beneath(Hosted, self, "_prepare_cache_for_generation")(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        host = host_of(self)
        if host is not None:
            if generation_mode in _MODE_REASONS:
                host.calls.note(_MODE_REASONS[generation_mode])
            if given is not None and (request := _request.get()) is not None:
                request.has_callers_cache = True
            cache, caching = model_kwargs.get(CACHE), _caching(host)
            if given is None and cache is not None and caching is not None:
                rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
                mask = model_kwargs.get("attention_mask")
                caching.fill(NewCache(cache, self, generation_mode, rows, max_cache_length, mask))
        return result

    def _prefill(
        self, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        host = host_of(self)
        caching, request = host and _caching(host), _request.get()
        tenant = request.options.get("tenant") if request else None
        with caching.prefilling(self, input_ids, generation_config, model_kwargs, tenant) if caching else nullcontext():
            return beneath(Hosted, self, "_prefill")(input_ids, generation_config, model_kwargs, *args, **kwargs)

    @functools.wraps(PreTrainedModel.resize_token_embeddings)
    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        # refused, before transformers begins, where packed weights have the rows of the old vocabulary
        if (check := getattr(getattr(self, "hf_quantizer", None), "check_resize", None)) is not None:
            check(self, new_num_tokens, pad_to_multiple_of)
        resize = beneath(Hosted, self, "resize_token_embeddings")
        return resize(new_num_tokens, pad_to_multiple_of, *args, **kwargs)

    @functools.wraps(PreTrainedModel.save_pretrained)
    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        # packed weights are saved by what stands as the model's quantizer; an adapter beside them by transformers
        save = getattr(getattr(self, "hf_quantizer", None), "save_packed", None)
        if save is None or getattr(self, "_hf_peft_config_loaded", False):
            return beneath(Hosted, self, "save_pretrained")(*args, **kwargs)
        if "save_directory" in kwargs:
            args = (kwargs.pop("save_directory"), *args)
        return save(self, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        # the manager checks the attention's name and refuses names it does not know
        host = host_of(self)
        if host is not None and host.select_stock_attention is not None:
            host.select_stock_attention()
        return beneath(Hosted, self, "init_continuous_batching")(*args, **kwargs)
