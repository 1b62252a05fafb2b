"""What `run` returns: requests to replicas, each answered once, whichever of them die meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hf_accel.errors import ConfigError
from hf_accel.replicas.asked import Asked, asked_of
from hf_accel.replicas.package import ray_module
from hf_accel.replicas.pieces import Continued
from hf_accel.replicas.summary import summed
from hf_accel.replicas.tries import Tries


class Replicas:
    """A handle on replicas, for any number of threads and tasks; a context manager, which ends them.

    deployment: Ray Serve's handle. tries: replicas that a request may be sent to before it counts as what ends them.
    timeout_s: of one call of `generate`, with its tries. ending: what `shutdown` does.
    """

    def __init__(
        self, deployment: Any, tries: int = 3, timeout_s: float | None = None, ending: Callable[[], None] | None = None
    ) -> None:
        self.deployment, self.tries, self.timeout_s = deployment, tries, timeout_s
        self._ending = ending
        errors = ray_module("ray.exceptions")
        self._lost = (errors.RayActorError, errors.ObjectLostError)
        self._told_by = errors.RayTaskError

    def generate(self, inputs: Any, **options: Any) -> Any:
        """Write, as `model.generate` of one replica does, and return when it is written.

        Args:
            inputs: a text, or a list of texts, each a request of its own; or token ids [B, T] or a tokenizer's output.
            options: of `generate`; and `seed`, of what is drawn: the answer is then that of the model alone after
                `torch.manual_seed(seed)`. None: another each time.

        Returns:
            The text that follows, a list of these, or what `generate` returns for ids: [B, T + new].

        Raises:
            ReplicaError: the replicas that were given the request died, or none answered in time.
            ConfigError: inputs or options do not fit.
            Others: as `generate`, from the replica.
        """
        asked = _rows(inputs, options)
        sent = [(each, self._tries(), self.deployment.remote(each)) for each in asked]
        try:
            found = [self._answer(*each) for each in sent]
        except BaseException:
            for _, _, response in sent:
                response.cancel()
            raise
        return found if _is_many(inputs) else found[0]

    async def generate_async(self, inputs: Any, **options: Any) -> Any:
        """Write as `generate` does, without holding up the event loop."""
        tasks = [asyncio.ensure_future(self._answer_async(each)) for each in _rows(inputs, options)]
        try:
            found = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            raise
        return found if _is_many(inputs) else found[0]

    def stream(self, text: str, **options: Any) -> Iterator[str]:
        """Yield pieces of the text that follows on `text`; where a replica dies, another goes on where it was.

        Raises:
            As `generate`; and ReplicaError where the other replica writes another text. `timeout_s` does not count.
        """
        asked, tries, text_so_far = asked_of(_text(text), options), self._tries(), Continued()
        while True:
            with tries.another(), self._plain():
                text_so_far.begin()
                for piece in self.deployment.options(method_name="pieces", stream=True).remote(asked):
                    if new := text_so_far.new(piece):
                        yield new
                return

    async def stream_async(self, text: str, **options: Any) -> AsyncIterator[str]:
        """Yield pieces as `stream` does, without holding up the event loop."""
        asked, tries, text_so_far = asked_of(_text(text), options), self._tries(), Continued()
        while True:
            with tries.another(), self._plain():
                text_so_far.begin()
                async for piece in self.deployment.options(method_name="pieces", stream=True).remote(asked):
                    if new := text_so_far.new(piece):
                        yield new
                return

    def report(self) -> dict[str, Any]:
        """Return what the replicas did: sums over them, and under "replicas" what each tells; see `summed`."""
        tries = self._tries()
        while True:
            with tries.another(), self._plain():
                return summed(self.deployment.broadcast("report").results(timeout_s=self.timeout_s))

    def shutdown(self) -> None:
        """End the replicas, and of Ray what `run` started; Serve gives requests under way 20 s to be answered."""
        ending, self._ending = self._ending, None
        if ending is not None:
            ending()

    def __enter__(self) -> Replicas:
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()

    def _tries(self) -> Tries:
        return Tries(self.tries, self.timeout_s, self._lost)

    def _answer(self, asked: Asked, tries: Tries, response: Any) -> Any:
        while True:
            with tries.another(), self._plain():
                sent, response = response or self.deployment.remote(asked), None
                return sent.result(timeout_s=tries.left_s)

    async def _answer_async(self, asked: Asked) -> Any:
        tries = self._tries()
        while True:
            with tries.another(), self._plain():
                response = self.deployment.remote(asked)
                try:
                    return await asyncio.wait_for(response, tries.left_s)
                except (asyncio.CancelledError, TimeoutError):
                    response.cancel()
                    raise

    @contextmanager
    def _plain(self) -> Iterator[None]:
        """Raise what a replica's code raised as it was raised there; Ray's account of it is the cause."""
        try:
            yield
        except self._told_by as error:
            raise error.cause from error


def _rows(inputs: Any, options: dict[str, Any]) -> list[Asked]:
    return [asked_of(each, options) for each in (inputs if _is_many(inputs) else [inputs])]


def _is_many(inputs: Any) -> bool:
    return isinstance(inputs, (list, tuple)) and all(isinstance(each, str) for each in inputs)


def _text(text: Any) -> str:
    if not isinstance(text, str):
        raise ConfigError(f"A stream follows on one text; {type(text).__name__} was given. Use generate for the rest.")
    return text
