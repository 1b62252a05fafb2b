"""Bad requests: each is refused in OpenAI's form, names its field, and leaves the endpoint as it was."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from serving import KEY, MESSAGES, NAME, PROMPT, ask, client, count, model, tokenizer
from test_errors import base_model, t5
from typer.testing import CliRunner

from hf_accel import ConfigError, HfAccelError, MissingDependencyError, UnsupportedModelError, endpoint
from hf_accel.assets import retrieval_path
from hf_accel.cli import app, serve
from hf_accel.endpoint import Limits, build_app

USER = {"role": "user", "content": "hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}

BOTH: list[tuple[str, Any, str]] = [
    # a field, what is wrong in it, and a word of what is said
    ("model", None, "valid string"),
    ("model", 5, "valid string"),
    ("n", 0, "greater than or equal to 1"),
    ("n", True, "valid integer"),
    ("n", 9, "8 choices"),
    ("max_tokens", 0, "greater than or equal to 1"),
    ("max_tokens", 1.5, "valid integer"),
    ("max_tokens", "5", "valid integer"),
    ("max_tokens", 2000, "context"),
    ("temperature", -0.1, "greater than or equal to 0"),
    ("temperature", 2.1, "less than or equal to 2"),
    ("temperature", "hot", "valid number"),
    ("temperature", 1e-6, "0.0001 at least"),
    ("temperature", float("nan"), "finite"),
    ("top_p", 0, "greater than 0"),
    ("top_p", 1.1, "less than or equal to 1"),
    ("seed", 1.5, "valid integer"),
    ("seed", 2**64, "less than or equal to"),
    ("stop", "", "at least 1 character"),
    ("stop", ["a", ""], "at least 1 character"),
    ("stop", ["a"] * 5, "at most 4"),
    ("stop", 5, "valid"),
    ("presence_penalty", 3, "less than or equal to 2"),
    ("frequency_penalty", [1], "valid number"),
    ("logit_bias", {"x": 1}, "pattern"),
    ("logit_bias", {"5": 101}, "less than or equal to 100"),
    ("logit_bias", {"1536": 1}, "no token 1536"),
    ("stream", "yes", "valid boolean"),
    ("stream_options", {"include_usage": True}, "belongs to stream"),
    ("tools", [CALL], "tool calls are not served"),
    ("tool_choice", "auto", "only its default"),
    ("response_format", {"type": "json_object"}, "not constrained"),
    ("functions", [CALL], "tool calls are not served"),
    ("store", True, "only its default"),
    ("top_k", 5, "not known"),
    ("reasoning_effort", "high", "not known"),
]
CHATS: list[tuple[str, Any, str]] = [
    ("messages", [], "at least 1"),
    ("messages", "hi", "valid list"),
    ("messages", ["hi"], "dictionary"),
    ("messages", [{"role": "user"}], "required"),
    ("messages", [{"role": "user", "content": None}], "required"),
    ("messages", [{"role": "boss", "content": "hi"}], "'user'"),
    ("messages", [{"role": "user", "content": 5}], "valid"),
    ("messages", [{**USER, "mood": "calm"}], "not permitted"),
    ("messages", [USER, {"role": "tool", "content": "5", "tool_call_id": "1"}], "tool calls are not served"),
    ("messages", [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tool calls are not served"),
    ("messages", [{"role": "user", "content": [IMAGE]}], "'image_url' are not served"),
    ("messages", [{"role": "user", "content": [{"type": "input_audio"}]}], "'input_audio' are not served"),
    ("messages", [{"role": "user", "content": [{"type": "text"}]}], "required"),
    ("messages", [{"role": "user", "content": "word " * 1100}], "context is 1024 tokens"),
    ("max_completion_tokens", 0, "greater than or equal to 1"),
    ("logprobs", 1, "valid boolean"),
    ("top_logprobs", 2, "belongs to logprobs"),
    ("top_logprobs", 21, "less than or equal to 20"),
    ("prompt", "hi", "not known"),
    ("modalities", ["audio"], "only its default"),
    ("audio", {"voice": "x"}, "no audio"),
]
PROMPTS: list[tuple[str, Any, str]] = [
    ("prompt", 5, "valid"),
    ("prompt", "", "not one token"),
    ("prompt", [], "one prompt per request"),
    ("prompt", ["a", "b"], "one prompt per request"),
    ("prompt", [1536], "no token 1536"),
    ("prompt", [-1], "no token -1"),
    ("prompt", [1, "a"], "valid"),
    ("prompt", "word " * 1100, "context is 1024 tokens"),
    ("logprobs", 21, "less than or equal to 20"),
    ("logprobs", True, "valid integer"),
    ("echo", True, "the prompt is not returned"),
    ("best_of", 3, "use n"),
    ("suffix", "end", "at the end of the prompt only"),
    ("messages", [USER], "not known"),
]
CASES = [("chat/completions", *case) for case in [*BOTH, *CHATS]]
CASES += [("completions", *case) for case in [*BOTH, *PROMPTS]]
NAMES = [f"{path[:4]} {field} {str(value)[:20]}" for path, field, value, _ in CASES]


@pytest.fixture(scope="module")
def here() -> TestClient:
    return client()


def post(here: TestClient, path: str, **given: Any) -> Any:
    begin = {"messages": MESSAGES} if path == "chat/completions" else {"prompt": PROMPT}
    return here.post(f"/v1/{path}", content=json.dumps({"model": NAME, "max_tokens": 4, **begin, **given}))


@pytest.mark.parametrize("path,field,value,word", CASES, ids=NAMES)
def test_a_field_that_does_not_fit_is_named(here: TestClient, path: str, field: str, value: Any, word: str) -> None:
    before = count(here, "generated_tokens_total")
    found = post(here, path, **{field: value})
    error = found.json()["error"]
    assert found.status_code == 400
    assert error["type"] == "invalid_request_error"
    asked_for_more = field == "max_tokens" and value == 2000  # it is the prompt that has no room for them
    assert error["param"].startswith(("prompt", "messages") if asked_for_more else field)
    assert word in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert count(here, "generated_tokens_total") == before


def test_the_endpoint_goes_on_after_refusals(here: TestClient) -> None:
    assert ask(here)["choices"][0]["finish_reason"] == "length"
    assert count(here, "running_requests") == count(here, "waiting_requests") == 0


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"[" * 100_000, b"[1]", b"null", b'"text"', b'{"prompt": "\\uD83D"}']
)
def test_bodies_that_are_no_object(here: TestClient, body: bytes) -> None:
    found = here.post("/v1/completions", content=body)
    assert found.status_code == 400
    assert "JSON" in found.json()["error"]["message"]


def test_bodies_that_are_too_large() -> None:
    here = client(body_bytes=1000)
    assert post(here, "completions").status_code == 200
    for sent in ({"content": b" " * 1001}, {"content": iter([b" " * 600, b" " * 600])}):
        found = here.post("/v1/completions", **sent)
        assert (found.status_code, found.json()["error"]["code"]) == (413, "request_too_large")


def test_other_models_paths_and_methods(here: TestClient) -> None:
    found = post(here, "completions", model="other")
    assert (found.status_code, found.json()["error"]["code"]) == (404, "model_not_found")
    assert "'other'" in found.json()["error"]["message"]
    assert here.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert here.get("/v1/completions").status_code == 405


def test_a_tokenizer_without_a_template_and_one_that_refuses() -> None:
    found = post(client(template=None), "chat/completions")
    assert (found.status_code, found.json()["error"]["code"]) == (400, "no_chat_template")
    assert "/v1/completions" in found.json()["error"]["message"]
    strict = client(template="{{ raise_exception('roles must alternate') }}")
    found = post(strict, "chat/completions")
    assert found.status_code == 400
    assert "roles must alternate" in found.json()["error"]["message"]


def test_bounds_of_the_server_are_kept() -> None:
    here = client(new_tokens=3, choices=2, context_tokens=30)
    assert "3 are served" in post(here, "completions").json()["error"]["message"]
    assert "2 choices" in post(here, "completions", max_tokens=1, n=3).json()["error"]["message"]
    assert post(here, "completions", max_tokens=None).json()["usage"]["completion_tokens"] == 3
    long = post(here, "completions", max_tokens=1, prompt=[5] * 30)
    assert long.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("bound", [field.name for field in fields(Limits)])
@pytest.mark.parametrize("value", [-1, "5", True, float("nan"), 0.5])
def test_limits_that_do_not_fit(bound: str, value: Any) -> None:
    if (bound, value) == ("drain_s", 0.5):
        assert Limits(drain_s=0.5).drain_s == 0.5
        return
    with pytest.raises(ConfigError, match=rf"Limits\({bound}="):
        Limits(**{bound: value})


def test_what_cannot_be_served() -> None:
    for wrong in (base_model(), t5()):
        with pytest.raises(UnsupportedModelError, match="decoder-only"):
            build_app(wrong, tokenizer(), name=NAME)
    with pytest.raises(ConfigError, match="api_key is empty"):
        build_app(model(), tokenizer(), name=NAME, api_key="")
    assert client(key=KEY).get("/v1/models").status_code == 401


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(endpoint._PACKAGES, "no_such_package", "such-package")
    with pytest.raises(MissingDependencyError, match=r"such-package: pip install 'hf-accel\[serve\]'"):
        build_app(model(), tokenizer(), name=NAME)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


def test_the_command_serves_an_optimised_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    apps: list[Any] = []
    monkeypatch.setattr(serve, "run", lambda app, *others: apps.append((app, others)))
    template = tmp_path / "template.jinja"
    template.write_text("def {{ messages[0]['content'] }}(")
    options = ["--chat-template", template, "--name", NAME, "--api-key", KEY, "--port", 8123, "--new-tokens", 5]
    done = run("demo", "--dtype", "float32", "--threads", 1, "--drain", 2.0, *options)
    assert done.exit_code == 0, done.output + repr(done.exception)
    [(served, others)] = apps
    assert others == ("127.0.0.1", 8123, 2.0)
    here = TestClient(served, headers={"Authorization": f"Bearer {KEY}"})
    body = {"model": NAME, "messages": [{"role": "user", "content": "sort"}]}
    assert here.post("/v1/chat/completions", json=body).json()["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize(
    "arguments,word",
    [
        (["demo", "--running", 0], "Limits(running=0)"),
        (["demo", "--goal", "faster"], "faster"),
        (["demo", "--group-size", 64], "--group-size belongs to --bits"),
        (["no-such-folder/model"], "No tokenizer"),
        ([retrieval_path()], "No tokenizer"),
    ],
    ids=str,
)
def test_commands_that_do_not_fit(arguments: list[Any], word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(serve, "run", lambda *others: pytest.fail("it was served"))
    done = run(*arguments)
    assert done.exit_code == 2
    assert word in " ".join(done.output.split())
    assert isinstance(done.exception, SystemExit), "an error of ours, shown as one message"
    assert issubclass(ConfigError, HfAccelError)
