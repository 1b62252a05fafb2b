"""On a device that runs behind the host, whether a text is done is asked one step late, and nobody can tell."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from comparison import assert_equal_calls
from models import build, stock
from test_generate import Penalise, StopAt, batch, plain
from transformers import LogitsProcessorList, StoppingCriteriaList

import hf_accel
from hf_accel import DecodingConfig, KVCacheConfig
from hf_accel.core.calls.doors import Door
from hf_accel.core.calls.hosting import host_of
from hf_accel.decoding import arrival

ENDS: dict[str, Any] = {"eos_token_id": list(range(20, 60)), "pad_token_id": 3}


@pytest.fixture(autouse=True)
def _late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival, "ASYNCHRONOUS", frozenset({"cpu"}))


def counting(name: str = "llama") -> tuple[Any, list[int]]:
    """Return an optimised model, and a list that grows with every forward pass after the prompt."""
    model, passes = hf_accel.optimize(build(name), [DecodingConfig(), KVCacheConfig()]), []
    host: Any = host_of(model)

    def run(**inputs: Any) -> Any:
        passes.append(inputs["input_ids"].shape[1])
        return model(**inputs)

    host.stand(Door.FORWARD, run)
    return model, passes


@pytest.mark.parametrize("samples", [False, True])
def test_a_text_that_ends_takes_one_pass_more(samples: bool) -> None:
    """The same ids and random numbers as stock's, whatever the surplus pass has drawn."""
    model, passes = counting()
    result = assert_equal_calls(stock("llama"), model, batch(do_sample=samples, max_new_tokens=40, **ENDS))
    needed = result.shape[1] - 11 - 1
    assert needed < 38, "the text never ended"
    assert len(passes) == needed + 1


def test_a_text_of_maximal_length_takes_none() -> None:
    model, passes = counting()
    assert_equal_calls(stock("llama"), model, batch(do_sample=False, max_new_tokens=9))
    assert len(passes) == 8


def test_what_is_returned_is_without_the_surplus() -> None:
    model, passes = counting()
    call = batch(**ENDS, max_new_tokens=40, return_dict_in_generate=True, output_scores=True, output_logits=True,
                 output_hidden_states=True)  # fmt: skip
    result = assert_equal_calls(stock("llama"), model, call)
    assert len(passes) == len(result.scores)


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"logits_processor": LogitsProcessorList([Penalise()])},
        lambda: {"stopping_criteria": StoppingCriteriaList([StopAt(16)])},
    ],
    ids=["processor", "criterion"],
)
def test_code_of_the_users_is_not_called_too_often(make: Any) -> None:
    model, passes = counting()
    result = assert_equal_calls(stock("llama"), model, lambda found: batch(**ENDS, **make(), max_new_tokens=40)(found))
    assert len(passes) == result.shape[1] - 11 - 1


def test_a_window_that_is_returned_is_not_asked_to_drop_tokens() -> None:
    model, passes = counting("mistral")
    result = assert_equal_calls(stock("mistral"), model, batch(**ENDS, max_new_tokens=40, return_dict_in_generate=True))
    assert len(passes) == result.sequences.shape[1] - 11 - 1
    assert_equal_calls(stock("mistral"), model, batch(**ENDS, max_new_tokens=40))


def test_the_end_of_the_context_is_not_passed() -> None:
    """Behind the last position there is no embedding for a step too many."""
    model, original = build("gpt2"), build("gpt2")
    for target in (model, original):
        target.config.max_position_embeddings = target.config.n_positions = 20
        target.transformer.wpe.weight = torch.nn.Parameter(target.transformer.wpe.weight[:20].clone())
        target.transformer.wpe.num_embeddings = 20
    hf_accel.optimize(model, [DecodingConfig()])
    for ends in range(8, 128, 8):
        options = {"eos_token_id": list(range(ends, ends + 8)), "pad_token_id": 3, "max_length": 21}
        assert_equal_calls(original, model, plain(max_new_tokens=None, do_sample=False, **options))


class Waited:
    """Notes which arrivals were made, and which were waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Any] = []
        self.waited: list[Any] = []
        begin = arrival.Arrival.__init__

        def made(one: Any, *rest: Any) -> None:
            begin(one, *rest)
            self.made.append(one)

        monkeypatch.setattr(arrival.Arrival, "__init__", made)
        monkeypatch.setattr(arrival.Arrival, "wait", lambda one: self.waited.append(one))


@pytest.mark.parametrize("samples", [False, True])
def test_a_step_too_many_is_over_when_the_text_is_returned(samples: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call may write to the same buffers from another stream, and the text may be read from one."""
    model, passes = counting()
    seen = Waited(monkeypatch)
    text = batch(do_sample=samples, max_new_tokens=40, **ENDS)(model)
    assert len(seen.made) == len(passes) + 1 == text.shape[1] - 11 + 1, "no step was made too many"
    assert seen.waited[-1] is seen.made[-1]


def test_a_call_that_an_error_ends_leaves_nothing_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        calls = 0

        def put(self, value: torch.Tensor) -> None:
            self.calls += 1
            if self.calls == 5:
                raise RuntimeError("the reader has gone")

        def end(self) -> None:
            pass

    model, _ = counting()
    seen = Waited(monkeypatch)
    with pytest.raises(RuntimeError, match="the reader has gone"):
        plain(do_sample=False, max_new_tokens=40, streamer=Broken())(model)
    assert seen.waited[-1] is seen.made[-1]


def test_flags_are_awaited_on_the_stream_of_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current device may be another one than the model's."""

    class Event:
        streams: ClassVar[list[Any]] = []

        def record(self, stream: Any = None) -> None:
            self.streams.append(stream)

        def synchronize(self) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"of {device}")
    monkeypatch.setattr(arrival, "_sent", lambda tensor: tensor)
    found = arrival.Arrival(torch.device("cuda:1"), torch.tensor([5]), torch.tensor(True))
    assert found.get() == (torch.tensor([5]), True)
    assert Event.streams == ["of cuda:1"]
