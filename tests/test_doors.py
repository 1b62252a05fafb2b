"""Who stands at a door is asked there, for as long as the model is optimised; keywords bring others for one call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from catalogue import exact
from models import build, prompt

import hf_accel
from hf_accel.core.calls.doors import Door
from hf_accel.core.calls.hosting import host_of
from hf_accel.core.calls.keywords import KEYWORDS, Keyword, register


class Server:
    """Serves greedy calls with the text it was given."""

    def __init__(self, text: torch.Tensor) -> None:
        self.text = text

    def obstacle(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        return "it samples" if kwargs.get("do_sample") else None

    def serve(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.text


def text(model: Any, **options: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(prompt(), **({"max_new_tokens": 6, "do_sample": False} | options))
    return found


def test_a_server_takes_the_calls_it_can_serve() -> None:
    model = build("llama")
    expected = text(model)
    hf_accel.optimize(model, exact(model))
    host: Any = host_of(model)
    host.stand(Door.GENERATE, Server(torch.tensor([[1, 2]])))
    assert text(model).tolist() == [[1, 2]]
    assert text(model, do_sample=True, top_k=1).shape == expected.shape
    assert hf_accel.report(model).to_dict()["calls"]["served"] == 2
    hf_accel.restore(model)
    assert torch.equal(text(model), expected)


@pytest.mark.parametrize("speculates", [False, True])
def test_passes_after_the_prompt_go_through_who_stands_there(speculates: bool) -> None:
    model = build("llama")
    expected = text(model, max_new_tokens=10)
    hf_accel.optimize(model, exact(model, speculates=speculates))
    host: Any = host_of(model)
    passes = []

    def run(**inputs: Any) -> Any:
        passes.append(inputs["input_ids"].shape[1])
        return model(**inputs)

    host.stand(Door.FORWARD, run)
    assert torch.equal(text(model, max_new_tokens=10), expected)
    assert passes
    assert sum(passes) >= 9 if speculates else passes == [1] * 9


def test_a_keyword_brings_who_stands_at_a_door_for_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_accel.core.calls.keywords.KEYWORDS", KEYWORDS)
    monkeypatch.setitem(KEYWORDS, "canned", None)
    register(Keyword("canned", lambda model, value, arguments: value and Server(value), (Door.GENERATE,)))
    model = build("llama")
    expected = text(model)
    hf_accel.optimize(model, exact(model))
    assert text(model, canned=torch.tensor([[3]])).tolist() == [[3]]
    assert torch.equal(text(model, canned=None), expected)
    host: Any = host_of(model)
    host.stand(Door.GENERATE, Server(torch.tensor([[4]])))
    assert text(model).tolist() == [[4]]
    assert torch.equal(text(model, canned=None), expected), "nobody stands there in this call"


def test_the_tenant_is_a_text() -> None:
    model = hf_accel.optimize(build("llama"), exact(build("llama")))
    with pytest.raises(hf_accel.ConfigError, match="tenant is a name"):
        text(model, tenant=3)
    text(model, tenant="a")


def test_undoing_puts_back_who_stood_there() -> None:
    model = hf_accel.optimize(build("llama"), exact(build("llama")))
    host: Any = host_of(model)
    before, loop = len(host.journal), host.doors[Door.TOKEN_LOOP]
    host.stand(Door.TOKEN_LOOP, object())
    host.journal.undo(before)
    assert host.doors[Door.TOKEN_LOOP] is loop
