"""A small model behind an endpoint: in this process, or behind a real server on 127.0.0.1."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openai
import torch
import uvicorn
from fastapi.testclient import TestClient
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteriaList

import hf_accel
from hf_accel.assets import demo_path
from hf_accel.endpoint import Limits, build_app

NAME, KEY = "demo", "sesame"
PROMPT = "def fibonacci(n):\n"
MESSAGES = [{"role": "user", "content": "Write a function."}]
TEMPLATE = "{% for m in messages %}# {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}def {% endif %}"


@functools.cache
def model() -> Any:
    """The demo model in fp32, optimised by steps that need no compiler."""
    found = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32, local_files_only=True).eval()
    return hf_accel.optimize(found, [hf_accel.KVCacheConfig(), hf_accel.DecodingConfig()])


def tokenizer(template: str | None = TEMPLATE) -> Any:
    found: Any = AutoTokenizer.from_pretrained(demo_path(), local_files_only=True)
    found.chat_template = template
    return found


def client(serves: Any = None, key: str | None = None, template: str | None = TEMPLATE, **limits: Any) -> TestClient:
    """Return a client in this process; without its lifespan, which `with` would begin and end."""
    app = build_app(serves or model(), tokenizer(template), name=NAME, limits=Limits(**limits), api_key=key)
    return TestClient(app, raise_server_exceptions=False)


class Running:
    """A server in a thread of this process, and clients of it."""

    def __init__(self, app: Any, drain_s: float) -> None:
        config = uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=round(drain_s))
        self.server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self.server.run)
        self._thread.start()
        wait_until(lambda: self.server.started)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)

    def stop(self) -> None:
        """Ask it to stop, as a signal would."""
        self.server.should_exit = True

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive(), "the server did not stop"


@contextmanager
def serving(serves: Any = None, **limits: Any) -> Iterator[Running]:
    """Serve for the length of the block."""
    bounds = Limits(**{"running": 4, "drain_s": 30.0} | limits)
    running = Running(build_app(serves or model(), tokenizer(), name=NAME, limits=bounds, api_key=KEY), bounds.drain_s)
    try:
        yield running
    finally:
        if isinstance(serves, Held):
            serves.go.set()
        running.stop()
        running.join()


class Held:
    """A model whose calls wait after `free` tokens until they are let go; it says how many tokens it wrote."""

    def __init__(self, free: int = 3) -> None:
        self.config, self.generation_config = model().config, model().generation_config
        self.device = model().device
        self.go, self.reached = threading.Event(), threading.Semaphore(0)
        self.written: list[int] = []
        self.criteria: list[Any] = []
        self._free = free

    def generate(self, stopping_criteria: Any, input_ids: torch.Tensor, **others: Any) -> Any:
        seen, waits = 0, False
        self.criteria += stopping_criteria

        def hold(ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
            nonlocal seen, waits
            seen = ids.shape[1] - input_ids.shape[1]
            if seen >= self._free and not waits:
                waits = True
                self.reached.release()
                self.go.wait(30)
            return torch.zeros(len(ids), dtype=torch.bool)

        try:
            criteria = StoppingCriteriaList([hold, *stopping_criteria])
            return model().generate(input_ids=input_ids, stopping_criteria=criteria, **others)
        finally:
            self.written.append(seen)

    def go_once_cancelled(self) -> None:
        """Let calls go, in a thread of its own, when the server wants one of them to end."""

        def go() -> None:
            wait_until(lambda: any(criterion._generation._cancelled.is_set() for criterion in self.criteria))
            self.go.set()

        threading.Thread(target=go).start()


def wait_until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for something that other threads do; after so many seconds it will not come."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "what was waited for did not come"
        time.sleep(0.005)


def written(prompt: str, *, chat: bool = False, **options: Any) -> str:
    """Return what the model's own `generate` writes after a prompt, or after MESSAGES."""
    words = tokenizer()
    text = words.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) if chat else prompt
    ids = words(text, return_tensors="pt")["input_ids"]
    found = model().generate(ids, attention_mask=torch.ones_like(ids), **options)
    return str(words.decode(found[0, ids.shape[1] :], skip_special_tokens=True))


def ask(where: TestClient, path: str = "completions", **fields: Any) -> Any:
    """Return the JSON of an answer that must be one."""
    begin = {"messages": MESSAGES} if path == "chat/completions" else {"prompt": PROMPT}
    found = where.post(f"/v1/{path}", json={"model": NAME, "max_tokens": 24, **begin, **fields})
    assert found.status_code == 200, found.text
    return found.json()


def count(where: TestClient, name: str) -> float:
    """Return a number of /metrics; those of several labels are added."""
    lines = [line for line in where.get("/metrics").text.splitlines() if line.startswith("hf_accel_" + name)]
    return sum(float(line.rpartition(" ")[2]) for line in lines if "_created" not in line)
