"""Hosting: a generated subclass per model instance through which every `generate` call passes.

`generate` looks its decoding methods up on the class, so an instance attribute `_sample` would be ignored; and a
class of its own for one instance leaves every other model of the architecture alone. Stock `generate` does all
preparation. Who stands at a door (`doors`) is asked there; what nobody serves goes on to stock, with every argument
intact, and is counted.
"""

from __future__ import annotations

import enum
import functools
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from hf_accel.core.calls.call import IN_PROGRESS, Call, CallLog, NewCache, Request
from hf_accel.core.calls.doors import MAKERS, CacheMaker, CallServer, Door, PaddedPromptReader, PromptReader, TextWriter
from hf_accel.core.calls.keywords import KEYWORDS, understood
from hf_accel.core.calls.report import Report
from hf_accel.core.calls.seeding import stocks_draws
from hf_accel.core.drift import CACHE
from hf_accel.core.journal import Journal, beneath, subclass
from hf_accel.core.recent import Recent
from hf_accel.errors import ConflictError

T = TypeVar("T")


@dataclass
class Host:
    """What one optimised model carries, beside it and not on it (on it, `deepcopy` and `torch.save` would break)."""

    journal: Journal
    report: Report
    draft_model: Any = None
    calls: CallLog = field(default_factory=CallLog)
    doors: dict[enum.Enum, Any] = field(default_factory=dict)  # who stands where
    built: dict[str, Any] = field(default_factory=dict)  # what calls with a config of their own had built
    lock: Any = field(default_factory=threading.RLock)  # for what calls add to the host

    def __post_init__(self) -> None:
        self.report.calls = self.calls

    def stand(self, door: Door, who: Any) -> None:
        """Put `who` at a door, until the journal is undone."""
        before = dict(self.doors)
        self.doors = self.doors | {door: who}
        self.journal.did(lambda: setattr(self, "doors", before))

    def built_once(self, name: str, config: Any, most: int, build: Callable[[], T]) -> T:
        """Return what calls with `config` use, built at the first of them; the `most` used last are kept.

        An error while it is built undoes what was written to the model, and reaches the caller.
        """
        with self.lock:
            kept: Recent[Any, T] = self.built.setdefault(name, Recent(most))
            if (found := kept.get(config)) is not None:
                return found
            before = len(self.journal)
            try:
                found = build()
            except BaseException:
                self.journal.undo(before)
                raise
            kept.put(config, found)
            return found


POSITIONAL = ("inputs", "generation_config")  # arguments of `generate` that are often given without their names

_opening = threading.Lock()


def host_of(model: Any) -> Host | None:
    """Return the host of an optimised model, None for any other.

    The generated class has it: a table of the process would keep every model whose host refers to it.
    """
    return getattr(type(model), "_hf_accel_host", None)


def open_host(model: PreTrainedModel, host: Host) -> None:
    """Give `model` its class and its host, through the host's journal.

    Raises:
        ConflictError: it has one: another thread has optimised it since this was begun.
    """
    with _opening:
        if host_of(model) is not None:
            raise ConflictError(
                f"This {type(model).__name__} was optimised by another thread meanwhile. Optimise a model in one place."
            )
        host.journal.swap_class(model, subclass(Hosted, type(model), _hf_accel_host=host))


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
        request = understood(self, own, others)
        token = IN_PROGRESS.set(request)
        try:
            with host.calls.counting():
                server: CallServer | None = _standing(host, Door.GENERATE)
                if server is not None and server.obstacle(self, args, kwargs) is None:
                    host.calls.note("")
                    return server.serve(self, args, kwargs)
                return beneath(Hosted, self, "generate")(*args, **kwargs)
        finally:
            IN_PROGRESS.reset(token)

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
        host, request = host_of(self), IN_PROGRESS.get() or Request()
        call = Call(
            self,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            synced_gpus,
            streamer,
            model_kwargs,
            request,
            {} if host is None else host.doors | request.standing,
        )
        writer = None if host is None else _writer(call)
        reason = "no token loop of ours is applied" if writer is None else writer.obstacle(call)
        if host is not None:
            host.calls.note(reason or "")
        if writer is None or reason:
            with stocks_draws(request, input_ids.device):
                return beneath(Hosted, self, "_sample")(input_ids, **call.stock_arguments())
        return writer.run(call)

    def _beam_search(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with stocks_draws(IN_PROGRESS.get(), input_ids.device):
            return beneath(Hosted, self, "_beam_search")(input_ids, *args, **kwargs)

    def _assisted_decoding(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with stocks_draws(IN_PROGRESS.get(), input_ids.device):
            return beneath(Hosted, self, "_assisted_decoding")(input_ids, *args, **kwargs)

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
            if given is not None and (request := IN_PROGRESS.get()) is not None:
                request.has_callers_cache = True
            cache = model_kwargs.get(CACHE)
            maker: CacheMaker | None = _standing(host, Door.NEW_CACHE)
            if given is None and cache is not None and maker is not None:
                rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
                mask = model_kwargs.get("attention_mask")
                maker.fill(NewCache(cache, self, generation_mode, rows, max_cache_length, mask))
        return result

    def _prefill(
        self, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        host = host_of(self)
        request = IN_PROGRESS.get()
        reader: PromptReader | None = None if host is None else _standing(host, Door.PREFILL)
        tenant = request.options.get("tenant") if request else None
        with reader.prefilling(self, input_ids, generation_config, model_kwargs, tenant) if reader else nullcontext():

            def run(ids: torch.Tensor, inputs: dict[str, Any]) -> Any:
                return beneath(Hosted, self, "_prefill")(ids, generation_config, inputs, *args, **kwargs)

            padded: PaddedPromptReader | None = None if host is None else _standing(host, Door.PADDED_PROMPT)
            if padded is not None:
                outputs = padded.read(self, input_ids, generation_config, model_kwargs, run)
                if outputs is not None:
                    return outputs
            return run(input_ids, model_kwargs)

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
        host = host_of(self)
        if host is not None and (prepare := host.doors.get(Door.CONTINUOUS_BATCHING)) is not None:
            prepare()
        return beneath(Hosted, self, "init_continuous_batching")(*args, **kwargs)


def _standing(host: Host, door: Door) -> Any:
    """Return who stands at a door in the call in progress, None if nobody does."""
    request = IN_PROGRESS.get()
    if request is not None and door in request.standing:
        return request.standing[door]
    return host.doors.get(door)


def _writer(call: Call) -> TextWriter | None:
    """Return the token loop of a call: the model's, or one made for a call that brings drafts."""
    found: TextWriter | None = call.doors.get(Door.TOKEN_LOOP)
    if found is None and call.request.standing.get(Door.DRAFTS) and Door.TOKEN_LOOP in MAKERS:
        found = MAKERS[Door.TOKEN_LOOP]()
    return found
