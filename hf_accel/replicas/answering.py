"""What a replica does: it makes its model once, and answers requests in threads of its own. It knows nothing of Ray."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from hf_accel.api import report
from hf_accel.batching import serving
from hf_accel.core.calls.doors import Door
from hf_accel.core.calls.hosting import host_of
from hf_accel.core.model.support import unwrap
from hf_accel.errors import ConfigError
from hf_accel.replicas.asked import Asked
from hf_accel.replicas.memory import memory_of
from hf_accel.replicas.recipe import ModelRecipe


def joined(model: Any) -> AbstractContextManager[Any]:
    """Return the context in which a replica's threads call `model.generate`.

    Calls of several threads join in one batch where the model is optimised with a token loop, if they do not already.
    """
    host = host_of(unwrap(model))
    can_join = host is not None and Door.TOKEN_LOOP in host.doors and Door.SCHEDULE not in host.doors
    return serving(model) if can_join else nullcontext(model)


class Answering:
    """A model that answers: `at_once` calls of `generate` run at the same time, each with `threads` threads."""

    def __init__(self, recipe: ModelRecipe, threads: int, at_once: int = 1) -> None:
        self.threads, self.answered = threads, 0
        self.broken: BaseException | None = (
            None  # what the accelerator failed with: the process can do nothing more on it
        )
        made = recipe.make()
        self.tokenizer = made.tokenizer
        self._joined = joined(made.model)
        self.model = self._joined.__enter__()
        self._drawing, self._counting = threading.Lock(), threading.Lock()
        # a thread's number of threads is its own where OpenMP computes
        self._workers = ThreadPoolExecutor(at_once, "generate", torch.set_num_threads, (threads,))

    def submit(self, asked: Asked, streamer: Any = None) -> Future[Any]:
        """Begin to answer in a thread; its result is that of `answer`."""
        return self._workers.submit(self.answer, asked, streamer)

    def answer(self, asked: Asked, streamer: Any = None) -> Any:
        """Return the text that follows on a text; for ids what `generate` returns, tensors on the CPU.

        Raises:
            ConfigError: a text was sent, and there is no tokenizer.
            Others: as `generate`.
        """
        inputs = self._read(asked.inputs)
        options = asked.options if streamer is None else {**asked.options, "streamer": streamer}
        try:
            found = self._generate(asked.seed, {**inputs, **options})
        except torch.AcceleratorError as error:
            self.broken = error
            raise
        with self._counting:
            self.answered += 1
        if not isinstance(asked.inputs, str):
            return found.cpu() if isinstance(found, torch.Tensor) else found
        ids = found if isinstance(found, torch.Tensor) else found.sequences
        return self.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def report(self) -> dict[str, Any]:
        """Return process, threads, requests answered, memory, and the model's report (None: it is not optimised)."""
        told = report(self.model).to_dict() if host_of(self.model) is not None else None
        about = {"pid": os.getpid(), "threads": self.threads, "answered": self.answered}
        return about | {"memory": memory_of(os.getpid()), "report": told}

    def close(self) -> None:
        """End the threads, after what they are at."""
        self._workers.shutdown()
        self._joined.__exit__(None, None, None)

    def _read(self, inputs: str | dict[str, Any]) -> dict[str, Any]:
        if isinstance(inputs, str):
            if self.tokenizer is None:
                raise ConfigError("The recipe gives no tokenizer: send token ids, or name one with tokenizer=...")
            inputs = dict(self.tokenizer(inputs, return_tensors="pt", return_token_type_ids=False))
        return {name: value.to(self.model.device) for name, value in inputs.items()}

    def _generate(self, seed: int, options: dict[str, Any]) -> Any:
        config = options.get("generation_config") or self.model.generation_config
        if not options.get("do_sample", config.do_sample):
            return self.model.generate(**options)
        if host_of(unwrap(self.model)) is not None:
            return self.model.generate(**options, seed=seed)
        device = self.model.device
        # torch has one generator per device: what draws from it waits for what else does
        with self._drawing, torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            return self.model.generate(**options)
