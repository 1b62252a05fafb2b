"""What clients get is what `model.generate` writes: text, ends, counts, log-probabilities, draws; in this process."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import openai
import pytest
import torch
from fastapi.testclient import TestClient
from serving import KEY, MESSAGES, NAME, PROMPT, ask, client, count, model, tokenizer, wait_until, written

from hf_accel.endpoint import Limits, build_app

PATHS = ("completions", "chat/completions")
SAMPLED = {"temperature": 0.8, "top_p": 0.9}


@pytest.fixture(scope="module")
def here() -> TestClient:
    return client(running=4)


def text_of(choice: dict[str, Any]) -> str:
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def events(here: TestClient, path: str, **fields: Any) -> list[dict[str, Any]]:
    """Return the chunks of a stream, which must end as streams do."""
    begin = {"messages": MESSAGES} if path == "chat/completions" else {"prompt": PROMPT}
    sent = here.post(f"/v1/{path}", json={"model": NAME, "max_tokens": 24, "stream": True, **begin, **fields})
    assert sent.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in sent.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def streamed(chunks: list[dict[str, Any]], choice: int = 0) -> tuple[str, list[str]]:
    """Return the text of a choice, and why it ended."""
    own = [found for chunk in chunks for found in chunk["choices"] if found["index"] == choice]
    texts = [found["text"] if "text" in found else found["delta"].get("content") or "" for found in own]
    return "".join(texts), [found["finish_reason"] for found in own if found["finish_reason"]]


@pytest.mark.parametrize("path", PATHS)
def test_greedy_text_is_that_of_generate(here: TestClient, path: str) -> None:
    expected = written(PROMPT, chat=path != "completions", max_new_tokens=24)
    answer = ask(here, path)
    assert text_of(answer["choices"][0]) == expected
    assert answer["choices"][0]["finish_reason"] == "length"
    used = answer["usage"]
    assert used["completion_tokens"] == 24
    assert used["total_tokens"] == used["prompt_tokens"] + 24
    assert (used["prompt_tokens"] == len(tokenizer()(PROMPT)["input_ids"])) == (path == "completions")
    chunks = events(here, path, stream_options={"include_usage": True})
    assert streamed(chunks) == (expected, ["length"])
    assert len(chunks) > 10, "the text came in one piece"
    assert chunks[-1]["usage"] == used
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize("path", PATHS)
def test_a_seed_draws_what_generate_draws_whatever_else_is_served(here: TestClient, path: str) -> None:
    fields = {**SAMPLED, "seed": 11}
    with torch.random.fork_rng([]):
        torch.manual_seed(11)
        expected = written(PROMPT, chat=path != "completions", max_new_tokens=24, do_sample=True, top_k=0, **SAMPLED)
    others = [SAMPLED, {}, {**SAMPLED, "seed": 12}, fields, SAMPLED, fields]
    with ThreadPoolExecutor(len(others)) as pool:
        answers = list(pool.map(lambda other: ask(here, path, **other), others))
    texts = [text_of(answer["choices"][0]) for answer in answers]
    assert texts[3] == texts[5] == expected
    assert texts[2] != expected
    assert texts[1] == written(PROMPT, chat=path != "completions", max_new_tokens=24)


def test_draws_without_a_seed_differ_and_go_on_after_a_seed(here: TestClient) -> None:
    free = [text_of(ask(here, **SAMPLED)["choices"][0]) for _ in range(2)]
    seeded = [text_of(ask(here, **SAMPLED, seed=1)["choices"][0]) for _ in range(2)]
    later = [text_of(ask(here, **SAMPLED)["choices"][0]) for _ in range(2)]
    assert seeded[0] == seeded[1]
    assert len({*free, *later, seeded[0]}) == 5


@pytest.mark.parametrize("path", PATHS)
def test_several_choices(here: TestClient, path: str) -> None:
    fields = {"n": 3, "temperature": 1.0, "seed": 5}
    answer = ask(here, path, **fields)
    texts = [text_of(choice) for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    chunks = events(here, path, **fields, stream_options={"include_usage": True})
    assert [streamed(chunks, number)[0] for number in range(3)] == texts
    assert chunks[-1]["usage"] == answer["usage"]


@pytest.mark.parametrize("path", PATHS)
def test_text_ends_before_a_stop_string(here: TestClient, path: str) -> None:
    whole = written(PROMPT, chat=path != "completions", max_new_tokens=24)
    pieces = [streamed([chunk])[0] for chunk in events(here, path)]
    tokens = [piece for piece in pieces if piece]
    across = tokens[3][-1:] + tokens[4] + tokens[5][:1]  # ends of three tokens
    cut = whole[: whole.index(across)]
    for stop in (across, ["never written", across], [across, "also never"]):
        choice = ask(here, path, stop=stop)["choices"][0]
        assert (text_of(choice), choice["finish_reason"]) == (cut, "stop")
        assert streamed(events(here, path, stop=stop)) == (cut, ["stop"])
    assert ask(here, path, stop=across)["usage"]["completion_tokens"] < 24
    ends = whole[-2:] + "~"  # what could be its beginning is shown once it is none
    assert streamed(events(here, path, stop=ends)) == (whole, ["length"])


def test_the_end_of_a_text_is_no_part_of_it(here: TestClient) -> None:
    end = tokenizer().eos_token_id
    answer = ask(here, logit_bias={str(end): 100}, logprobs=0, max_tokens=5)
    assert answer["choices"][0]["text"] == ""
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 1
    assert answer["choices"][0]["logprobs"]["tokens"] == []


@torch.no_grad()
def test_logprobs_are_the_models_own(here: TestClient) -> None:
    words = tokenizer()
    choice = ask(here, logprobs=3, temperature=0, presence_penalty=1.5)["choices"][0]
    found, text = choice["logprobs"], choice["text"]
    assert "".join(found["tokens"]) == text
    places = list(zip(found["text_offset"], found["tokens"], strict=True))
    assert all(text.startswith(token, at) for at, token in places)
    start = len(words(PROMPT)["input_ids"])
    ids = words(PROMPT + text, return_tensors="pt")["input_ids"]
    lines = model()(ids).logits[0].log_softmax(-1)[start - 1 : -1]
    assert [words.decode([token]) for token in ids[0, start:]] == found["tokens"]
    for line, token, value, best in zip(lines, ids[0, start:], found["token_logprobs"], found["top_logprobs"]):
        assert value == pytest.approx(line[token].item(), abs=1e-4)
        assert list(best.values()) == pytest.approx(line.topk(3).values.tolist(), abs=1e-4)
        assert list(best) == [words.decode([place]) for place in line.topk(3).indices]


def test_logprobs_of_chats_streams_and_stopped_texts(here: TestClient) -> None:
    choice = ask(here, "chat/completions", logprobs=True, top_logprobs=2)["choices"][0]
    entries = choice["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == choice["message"]["content"]
    assert all(entry["logprob"] == entry["top_logprobs"][0]["logprob"] for entry in entries), "greedy"
    sent = events(here, "chat/completions", logprobs=True, top_logprobs=2)
    parts = [choice["logprobs"]["content"] for chunk in sent for choice in chunk["choices"] if choice["logprobs"]]
    assert [entry for part in parts for entry in part] == entries
    stopped = ask(here, logprobs=0, stop="\n")["choices"][0]
    assert "".join(stopped["logprobs"]["tokens"]) == stopped["text"], "tokens of the stop string are reported"
    assert stopped["logprobs"]["top_logprobs"] is None


@torch.no_grad()
@pytest.mark.parametrize("presence,frequency", [(1.5, 0.0), (0.0, 0.7), (0.6, -0.4)])
def test_penalties_equal_a_textbook_in_plain_loops(here: TestClient, presence: float, frequency: float) -> None:
    words = tokenizer()
    prompt = words(PROMPT)["input_ids"]
    bias, made = {30: 4.0, 17: -3.0}, list[int]()
    for _ in range(24):
        scores = model()(torch.tensor([prompt + made])).logits[0, -1].tolist()
        for token in range(len(scores)):
            times = made.count(token) if token in made else 0
            scores[token] += bias.get(token, 0.0) - times * frequency - (times > 0) * presence
        made.append(max(range(len(scores)), key=scores.__getitem__))
    fields = {"presence_penalty": presence, "frequency_penalty": frequency}
    answer = ask(here, **fields, logit_bias={str(token): value for token, value in bias.items()})
    assert answer["choices"][0]["text"] == words.decode(made, skip_special_tokens=True)


def test_prompts_may_be_tokens_and_fields_may_be_null_or_say_nothing(here: TestClient) -> None:
    expected = ask(here)["choices"]
    tokens = tokenizer()(PROMPT)["input_ids"]
    for prompt in (tokens, [PROMPT], [tokens]):
        assert ask(here, prompt=prompt)["choices"] == expected
    inert = {"user": "me", "tools": [], "response_format": {"type": "text"}, "stop": None, "n": None, "echo": False}
    assert ask(here, **inert)["choices"] == expected
    assert ask(here, max_tokens=None)["usage"]["completion_tokens"] == 16
    parts = [{"role": "user", "content": [{"type": "text", "text": MESSAGES[0]["content"]}]}]
    whole = ask(here, "chat/completions")
    assert ask(here, "chat/completions", messages=parts)["choices"] == whole["choices"]
    assert ask(here, "chat/completions", max_tokens=None, max_completion_tokens=24)["choices"] == whole["choices"]
    near = ask(client(context_tokens=len(tokens) + 5), max_tokens=None)
    assert near["usage"]["completion_tokens"] == 5


def test_models_health_and_counts() -> None:
    here = client(key=KEY)
    assert here.get("/health").json() == {"status": "ok"}
    head = {"Authorization": f"Bearer {KEY}"}
    [found] = here.get("/v1/models", headers=head).json()["data"]
    assert (found["id"], found["max_model_len"]) == (NAME, model().config.max_position_embeddings)
    assert here.get(f"/v1/models/{NAME}", headers=head).json() == found
    assert here.get("/v1/models/a/other", headers=head).status_code == 404
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 7}
    assert here.post("/v1/completions", json=body).status_code == 401
    assert here.post("/v1/completions", json=body, headers={"Authorization": "Bearer other"}).status_code == 401
    assert here.post("/v1/completions", json=body, headers=head).status_code == 200
    assert count(here, 'requests_total{path="/v1/completions",status="200"}') == 1
    assert count(here, 'requests_total{path="/v1/completions",status="401"}') == 2
    assert count(here, "generated_tokens_total") == 7
    assert count(here, "prompt_tokens_total") == len(tokenizer()(PROMPT)["input_ids"])
    assert count(here, "time_to_first_token_seconds_count") == 1
    assert count(here, "time_between_tokens_seconds_count") == 6
    assert count(here, "running_requests") == count(here, "waiting_requests") == 0


def test_the_asynchronous_client_in_this_process() -> None:
    app = build_app(model(), tokenizer(), name=NAME, limits=Limits(running=2), api_key=KEY)

    async def both() -> list[str]:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app)) as transport:
            speaker = openai.AsyncOpenAI(base_url="http://here/v1", api_key=KEY, http_client=transport)
            calls = [speaker.completions.create(model=NAME, prompt=PROMPT, max_tokens=count) for count in (8, 16)]
            return [answer.choices[0].text for answer in await asyncio.gather(*calls)]

    assert asyncio.run(both()) == [written(PROMPT, max_new_tokens=count) for count in (8, 16)]


def test_a_lifespan_ends_its_threads() -> None:
    with client(drain_s=1.0) as here:
        assert ask(here)["choices"]
    found = here.post("/v1/completions", json={"model": NAME, "prompt": PROMPT})
    assert (found.status_code, found.json()["error"]["code"]) == (503, "shutting_down")
    assert here.get("/health").status_code == 503
    wait_until(lambda: count(here, "running_requests") == 0)
