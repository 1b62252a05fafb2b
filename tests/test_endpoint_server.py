"""A real server on 127.0.0.1 and OpenAI's own client: streams, clients that go away, stopping, how many are let in."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any

import httpx2
import openai
import pytest
from serving import KEY, MESSAGES, NAME, PROMPT, Held, Running, model, serving, tokenizer, wait_until, written

BODY = {"model": NAME, "prompt": PROMPT, "max_tokens": 200}


def counted(running: Running, name: str) -> float:
    lines = httpx2.get(f"{running.url}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"hf_accel_{name}"))


def stream(running: Running, **fields: Any) -> Any:
    return running.client.completions.create(**{**BODY, "stream": True, **fields})


def test_the_client_gets_what_generate_writes() -> None:
    with serving() as running:
        ask = running.client.chat.completions.create
        fields: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "max_completion_tokens": 24}
        answer = ask(**fields, logprobs=True, top_logprobs=1)
        expected = written(PROMPT, chat=True, max_new_tokens=24)
        assert answer.choices[0].message.content == expected
        assert answer.choices[0].message.role == "assistant"
        assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens == 24
        chunks = list(ask(**fields, stream=True, stream_options={"include_usage": True}))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-2].choices[0].finish_reason == "length"
        assert chunks[-1].usage == answer.usage.model_copy(update=dict(chunks[-1].usage))
        assert [found.id for found in running.client.models.list()] == [NAME]
        drawn: dict[str, Any] = {"model": NAME, "prompt": PROMPT, "max_tokens": 12, "seed": 1, "temperature": 0.7}
        texts = [running.client.completions.create(**drawn).choices[0].text for _ in range(2)]
        assert texts[0] == texts[1]
        with pytest.raises(openai.AuthenticationError, match="Send the key"):
            running.client.with_options(api_key="other").models.list()


def test_many_clients_at_once_get_their_own_texts() -> None:
    prompts = ["def f(", "import os\n", "class Reader:\n", "x = [", "return self."]
    expected = [written(prompt, max_new_tokens=16) for prompt in prompts]
    with serving() as running, ThreadPoolExecutor(5) as pool:

        def ask(prompt: str) -> str:
            parts = stream(running, prompt=prompt, max_tokens=16)
            return "".join(part.choices[0].text for part in parts)

        for _ in range(2):
            assert list(pool.map(ask, prompts)) == expected


def test_a_reader_who_leaves_ends_the_call() -> None:
    held = Held(free=3)
    with serving(held) as running:
        parts = stream(running)
        next(iter(parts))
        assert held.reached.acquire(timeout=30)
        parts.close()
        held.go_once_cancelled()
        wait_until(lambda: bool(held.written))
        assert held.written == [3], "tokens were written for nobody"
        wait_until(lambda: counted(running, 'requests_total{path="/v1/completions",status="499"}') == 1)
        wait_until(lambda: counted(running, "running_requests") == 0)


def test_a_client_that_does_not_wait_for_its_answer_ends_the_call() -> None:
    held = Held(free=3)
    with serving(held) as running:
        connection = HTTPConnection(running.url.removeprefix("http://"))
        connection.request("POST", "/v1/completions", json.dumps(BODY), {"Authorization": f"Bearer {KEY}"})
        assert held.reached.acquire(timeout=30)
        connection.close()
        held.go_once_cancelled()
        wait_until(lambda: bool(held.written))
        assert held.written == [3]
        wait_until(lambda: counted(running, 'requests_total{path="/v1/completions",status="499"}') == 1)


def test_too_many_are_sent_away_and_told_when_to_come_back() -> None:
    held = Held(free=2)
    with serving(held, running=1, waiting=1) as running:
        first = stream(running, max_tokens=4)
        assert held.reached.acquire(timeout=30)
        second = stream(running, max_tokens=4)  # waits
        assert counted(running, "running_requests") == counted(running, "waiting_requests") == 1
        with pytest.raises(openai.RateLimitError, match="no more are taken") as refused:
            stream(running)
        assert refused.value.status_code == 429
        assert int(refused.value.response.headers["retry-after"]) >= 1
        second.close()  # who has left does not wait
        wait_until(lambda: counted(running, "waiting_requests") == 0)
        third = stream(running, max_tokens=4)
        held.go.set()
        expected = written(PROMPT, max_new_tokens=4)
        for parts in (first, third):
            assert "".join(part.choices[0].text for part in parts) == expected
        assert len(held.written) == 2, "the model wrote for who had left"


def test_stopping_lets_those_finish_who_are_there() -> None:
    held = Held(free=2)
    with serving(held) as running:
        parts = stream(running, max_tokens=8)
        assert held.reached.acquire(timeout=30)
        running.stop()
        wait_until(lambda: not _answers(running))
        held.go.set()
        texts = [part.choices[0] for part in parts]
        running.join()
    assert "".join(found.text for found in texts) == written(PROMPT, max_new_tokens=8)
    assert texts[-1].finish_reason == "length"


def test_stopping_waits_no_longer_than_it_was_told() -> None:
    held = Held(free=2)
    with serving(held, drain_s=1.0) as running:
        parts = stream(running)
        next(iter(parts))
        assert held.reached.acquire(timeout=30)
        running.stop()
        held.go_once_cancelled()  # between two tokens for longer than the server waits, it ends at the next
        with pytest.raises((httpx2.HTTPError, openai.APIError)):
            list(parts)
        running.join()
    assert held.written == [2]


def test_a_model_that_fails_within_a_stream() -> None:
    class Failing(Held):
        def generate(self, stopping_criteria: Any, input_ids: Any, **others: Any) -> Any:
            super().generate(stopping_criteria, input_ids, **{**others, "max_new_tokens": 2})
            raise RuntimeError("a secret of the server")

    failing = Failing()
    failing.go.set()
    with serving(failing) as running:
        with pytest.raises(openai.APIError, match="The model failed") as failed:
            list(stream(running))
        assert "secret" not in str(failed.value)
        with pytest.raises(openai.InternalServerError, match="The model failed"):
            running.client.completions.create(**BODY)
        assert [found.id for found in running.client.models.list()] == [NAME], "the server goes on"
    assert tokenizer().eos_token_id == model().generation_config.eos_token_id


def _answers(running: Running) -> bool:
    try:
        return httpx2.get(f"{running.url}/health").status_code == 200
    except httpx2.HTTPError:
        return False
