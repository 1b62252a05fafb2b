"""The handle on replicas, over a deployment that loses requests: each is answered once, or refused with its reason."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from hf_accel import ConfigError, MissingDependencyError, ReplicaError
from hf_accel.replicas import ModelRecipe, Replicas, generate, handle, package, run
from hf_accel.replicas.asked import Asked


class Died(Exception):
    """As Ray's error about a replica that is gone."""


class Told(Exception):
    """As Ray's error about an error in a replica."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class Response:
    """What comes of one request, as Ray Serve hands it out."""

    def __init__(self, found: Callable[[], Any]) -> None:
        self.found, self.is_cancelled = found, False

    def result(self, timeout_s: float | None) -> Any:
        return self.found()

    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()
        return self.found()

    def cancel(self) -> None:
        self.is_cancelled = True

    def __iter__(self) -> Iterator[str]:
        yield from self.found()

    async def __aiter__(self) -> AsyncIterator[str]:
        for piece in self.found():
            yield piece


class Deployment:
    """Answers a text in capitals; `losing` says what happens to the first requests with a text, one after the other."""

    def __init__(self, losing: dict[str, list[Exception]] | None = None) -> None:
        self.losing, self.asked = losing or {}, list[Asked]()
        self.responses = list[Response]()
        self.is_stream = False

    def remote(self, asked: Asked) -> Response:
        self.asked.append(asked)
        errors = self.losing.get(str(asked.inputs), [])
        error = errors.pop(0) if errors else None
        self.responses.append(Response(lambda: self._answer(asked, error)))
        return self.responses[-1]

    def options(self, method_name: str, stream: bool) -> Deployment:
        self.is_stream = stream
        return self

    def broadcast(self, name: str) -> Any:
        told = {"answered": len(self.asked), "memory": None, "report": None}
        return SimpleNamespace(results=lambda timeout_s: [told, told])

    def _answer(self, asked: Asked, error: Exception | None) -> Any:
        text = str(asked.inputs).upper()
        if self.is_stream:
            return self._pieces(text, error)
        if error is not None:
            raise error
        return text

    def _pieces(self, text: str, error: Exception | None) -> Iterator[str]:
        if error is not None:
            yield str(error)
            raise error
        yield from text


def errors_of(name: str) -> Any:
    return SimpleNamespace(RayActorError=Died, ObjectLostError=Died, RayTaskError=Told)


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handle, "ray_module", errors_of)


def both(deployment: Deployment, inputs: Any, is_async: bool, **options: Any) -> Any:
    replicas = Replicas(deployment, **options)
    return asyncio.run(replicas.generate_async(inputs)) if is_async else replicas.generate(inputs)


@pytest.mark.parametrize("is_async", [False, True])
def test_requests_of_dead_replicas_are_sent_again_and_answered_once(is_async: bool) -> None:
    deployment = Deployment({"b": [Died("1")], "d": [Died("1"), Died("2")]})
    assert both(deployment, list("abcd"), is_async) == list("ABCD")
    sent = [asked.inputs for asked in deployment.asked]
    assert {text: sent.count(text) for text in "abcd"} == {"a": 1, "b": 2, "c": 1, "d": 3}
    seeds = {text: {asked.seed for asked in deployment.asked if asked.inputs == text} for text in "abcd"}
    assert all(len(seed) == 1 for seed in seeds.values())  # the same request to the bit
    assert both(Deployment(), "one", is_async) == "ONE"


@pytest.mark.parametrize("is_async", [False, True])
def test_a_request_that_ends_every_replica_is_refused_after_its_tries(is_async: bool) -> None:
    deployment = Deployment({"b": [Died("out of memory")] * 9})
    with pytest.raises(ReplicaError, match=r"4 replicas died with this request.*out of memory") as raised:
        both(deployment, ["a", "b"], is_async, tries=4)
    assert isinstance(raised.value.__cause__, Died)
    assert [asked.inputs for asked in deployment.asked].count("b") == 4


@pytest.mark.parametrize("is_async", [False, True])
def test_errors_of_the_model_come_as_they_are_and_end_the_others(is_async: bool) -> None:
    deployment = Deployment({"a": [Told(ValueError("max_new_tokens"))]})
    with pytest.raises(ValueError, match="max_new_tokens") as raised:
        both(deployment, ["a", "b"], is_async)
    assert isinstance(raised.value.__cause__, Told)
    assert [asked.inputs for asked in deployment.asked].count("a") == 1
    assert is_async or all(response.is_cancelled for response in deployment.responses)


@pytest.mark.parametrize("is_async", [False, True])
def test_time_that_is_over_is_an_error_that_says_so(is_async: bool) -> None:
    deployment = Deployment({"a": [TimeoutError()]})
    with pytest.raises(ReplicaError, match=r"answered within 0\.01 s"):
        both(deployment, "a", is_async, timeout_s=0.01)
    assert deployment.responses[0].is_cancelled


async def _all(stream: AsyncIterator[str]) -> list[str]:
    return [piece async for piece in stream]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_stream_goes_on_after_a_death_without_a_piece_twice(is_async: bool) -> None:
    def read(deployment: Deployment) -> list[str]:
        replicas = Replicas(deployment)
        return asyncio.run(_all(replicas.stream_async("abcd"))) if is_async else list(replicas.stream("abcd"))

    assert read(Deployment()) == list("ABCD")
    assert read(Deployment({"abcd": [Died("AB")]})) == ["AB", "C", "D"]
    with pytest.raises(ReplicaError, match="writes it differently"):
        read(Deployment({"abcd": [Died("AX")]}))
    with pytest.raises(ReplicaError, match="3 replicas died"):
        read(Deployment({"abcd": [Died("AB")] * 3}))


def test_reports_and_the_end() -> None:
    ended: list[int] = []
    with Replicas(Deployment(), ending=lambda: ended.append(1)) as replicas:
        assert replicas.report()["answered"] == 0
        with pytest.raises(ConfigError, match="A stream follows on one text"):
            next(replicas.stream(["a"]))  # type: ignore[arg-type]
    replicas.shutdown()
    assert ended == [1]


@pytest.mark.parametrize(
    "use",
    [
        lambda: run(ModelRecipe("x")),
        lambda: generate(None, ModelRecipe("x")),
        lambda: package.ray_module("ray.exceptions"),
    ],
)
def test_a_missing_ray_names_the_extra(use: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ray", "ray.data", "ray.serve", "ray.exceptions"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'hf-accel\[ray\]'"):
        use()


@pytest.mark.parametrize("wrong", [{"replicas": 0}, {"at_once": 0}, {"tries": 1.5}, {"cpus": 0}])
def test_numbers_that_do_not_fit_are_refused_before_anything_starts(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="it is a number, 1 or more"):
        run(ModelRecipe("x"), **wrong)
