"""A token of one text in one native call for the whole model: stock's text, and who changes or watches it sees it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from comparison import assert_equal_calls
from models import NAMES, build, padded, prompt, stock
from test_generate import Penalise, StopAt, plain
from texts import tokenizer
from transformers import LogitsProcessorList, StoppingCriteriaList

import hf_accel
from hf_accel import AttentionConfig, DecoderBlockConfig, DecodingConfig, KVCacheConfig, NativeLinearConfig
from hf_accel.core.calls.doors import Door
from hf_accel.core.calls.hosting import host_of
from hf_accel.kernels.native import set_isa, status, supported_isas
from hf_accel.layers.stepping import StepRunner

pytestmark = pytest.mark.native
NEW = 14  # tokens of `plain`
WITHOUT = {"mixtral", "qwen3_moe", "deepseek_v3", "bitnet"}  # experts, or layers that are not understood
SERVED = [name for name in NAMES if name not in WITHOUT]


def whole(name: str, dtype: torch.dtype = torch.float32, *more: Any) -> tuple[Any, StepRunner]:
    """Return a model whose steps are single native calls, and what runs them."""
    steps = [DecoderBlockConfig(max_rows=16), AttentionConfig(), KVCacheConfig(), DecodingConfig(), *more]
    model = hf_accel.optimize(build(name, dtype), steps if more else [NativeLinearConfig(), *steps])
    host: Any = host_of(model)
    return model, host.doors[Door.FORWARD]


def served(runner: StepRunner, call: Callable[[], Any]) -> int:
    """Return how many steps of a call were native calls."""
    before = runner.served
    call()
    return runner.served - before


@pytest.mark.parametrize("name", SERVED)
def test_greedy_and_sampled_texts_are_stocks(name: str) -> None:
    model, runner = whole(name)
    for arguments in ({}, {"do_sample": True}, {"max_new_tokens": 60}):
        call = partial(assert_equal_calls, stock(name), model, plain(**arguments))
        assert served(runner, call) == arguments.get("max_new_tokens", NEW) - 1


@pytest.mark.parametrize("name", sorted(WITHOUT - {"deepseek_v3", "bitnet"}))
def test_where_there_is_none_the_report_says_why(name: str) -> None:
    model = hf_accel.optimize(build(name), [DecoderBlockConfig(), DecodingConfig()])
    assert "a token runs layer by layer (not every layer is a single native call)" in str(hf_accel.report(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt"])
def test_a_step_gives_the_logits_of_layers_one_by_one(name: str, dtype: torch.dtype) -> None:
    model, _runner = whole(name, dtype)
    host: Any = host_of(model)
    call = plain(return_dict_in_generate=True, output_logits=True)
    found = call(model)
    host.doors = {door: who for door, who in host.doors.items() if door is not Door.FORWARD}
    expected = call(model)
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.logits, expected.logits, strict=True):
        assert float((one - other).norm() / other.norm()) < 2e-2


@pytest.mark.parametrize("isa", supported_isas())
def test_on_every_instruction_set(isa: str) -> None:
    usual = status().isa
    set_isa(isa)
    try:
        for name in ("llama", "gpt2"):
            model, runner = whole(name)
            assert served(runner, lambda: assert_equal_calls(stock(name), model, plain())) == NEW - 1  # noqa: B023
    finally:
        set_isa(usual)


CALLS: dict[str, tuple[dict[str, Any], bool]] = {
    "scores": ({"return_dict_in_generate": True, "output_scores": True, "output_logits": True}, True),
    "hidden states": ({"return_dict_in_generate": True, "output_hidden_states": True}, False),
    "end of text": ({"eos_token_id": [74, 101], "pad_token_id": 3, "max_new_tokens": 40}, True),
    "minimal length": ({"eos_token_id": list(range(20, 60)), "pad_token_id": 3, "min_new_tokens": 9}, True),
    "processor": ({"make_logits_processor": lambda: LogitsProcessorList([Penalise()])}, True),
    "criterion": ({"make_stopping_criteria": lambda: StoppingCriteriaList([StopAt(21)])}, True),
    "stop strings": ({"stop_strings": ["aaabacad"], "tokenizer": tokenizer()}, True),
    "no mask": ({"attention_mask": None}, True),
    "hidden columns": ({"attention_mask": torch.tensor([[1, 1, 0, *[1] * 8]])}, False),
    "two texts": ({"do_sample": True, "num_return_sequences": 2}, True),
    "no cache": ({"use_cache": False}, False),
}


@pytest.mark.parametrize("case", CALLS)
def test_what_is_asked_for_is_given(case: str) -> None:
    arguments, is_served = CALLS[case]
    model, runner = whole("llama")
    count = served(runner, lambda: assert_equal_calls(stock("llama"), model, plain(**arguments)))
    assert bool(count) == is_served


def test_a_padded_batch_runs_layer_by_layer() -> None:
    model, runner = whole("gemma3")
    call = lambda m: m.generate(**padded([3, 11, 8]), max_new_tokens=NEW)  # noqa: E731
    assert not served(runner, lambda: assert_equal_calls(stock("gemma3"), model, call))
    one = lambda m: m.generate(**{k: v[:1] for k, v in padded([3, 11]).items()}, max_new_tokens=NEW)  # noqa: E731
    assert not served(runner, lambda: assert_equal_calls(stock("gemma3"), model, one))


def test_a_cache_of_the_callers_goes_on() -> None:
    model, runner = whole("llama")

    def twice(found: Any) -> Any:
        first = found.generate(prompt(), max_new_tokens=6, return_dict_in_generate=True)
        more = torch.cat([first.sequences, prompt(1, 3, 5)], dim=1)
        return found.generate(more, past_key_values=first.past_key_values, max_new_tokens=6)

    assert served(runner, lambda: assert_equal_calls(stock("llama"), model, twice)) == 10


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_more_positions_than_were_known_at_first(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_accel.layers.step_guard.POSITIONS", 16)
    model, runner = whole(name)
    assert served(runner, lambda: assert_equal_calls(stock(name), model, plain(max_new_tokens=70))) == 69


def changed_in_place(model: Any) -> None:
    model.get_input_embeddings().weight.data.mul_(1.5)


def other_memory(model: Any) -> None:
    head = model.get_output_embeddings()
    head.weight.data = head.weight.data.flip(0).contiguous()


def other_parameter(model: Any) -> None:
    norm = model.model.norm
    norm.weight = torch.nn.Parameter(norm.weight.detach() * torch.linspace(0.2, 2.0, len(norm.weight)))


def other_layer_weights(model: Any) -> None:
    part = model.model.layers[1].mlp.down_proj
    part.weight.data = part.weight.data.flip(0).contiguous()


def loaded(model: Any) -> None:
    model.load_state_dict({name: value.flip(0) for name, value in model.state_dict().items()}, assign=True)


def turned_otherwise(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.7)


def scaled_by_a_class(model: Any) -> None:
    norm = model.model.norm
    norm.__class__ = type("Doubled", (type(norm),), {"forward": lambda self, x: 2 * super(type(self), self).forward(x)})


def another_constant(model: Any) -> None:
    model.model.norm.variance_epsilon = 3.0


CHANGES = [changed_in_place, other_memory, other_parameter, other_layer_weights, loaded, turned_otherwise,
           scaled_by_a_class, another_constant]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_calls_are_seen(change: Callable[[Any], None]) -> None:
    model, _ = whole("llama")
    call = plain(return_dict_in_generate=True, output_logits=True)
    before, other = call(model), build("llama")
    change(model)
    change(other)
    found = assert_equal_calls(other, model, call)
    assert not torch.equal(found.logits[1], before.logits[1]), "the change changes nothing"


@pytest.mark.parametrize("place", ["", "model", "model.norm", "model.embed_tokens", "lm_head", "model.layers.1"])
@pytest.mark.parametrize("is_late", [False, True])
def test_hooks_are_called(place: str, is_late: bool) -> None:
    model, _runner = whole("llama")
    plain()(model)
    calls: list[int] = []

    def add() -> None:
        model.get_submodule(place).register_forward_hook(lambda *_: calls.append(1))

    class Late:
        """Streams: hooks the module after the sixth token."""

        tokens = 0

        def put(self, value: Any) -> None:
            self.tokens += 1
            if self.tokens == 7:
                add()

        def end(self) -> None:
            pass

    if not is_late:
        add()
    plain(do_sample=False, **({"streamer": Late()} if is_late else {}))(model)
    assert len(calls) == (NEW - 6 if is_late else NEW)


def test_adapters_and_training_mode_and_restored_models() -> None:
    model, runner = whole("llama")
    model.train()
    assert not served(runner, lambda: plain()(model))
    model.eval()
    assert served(runner, lambda: plain()(model)) == NEW - 1
    hf_accel.restore(model)
    assert not served(runner, lambda: assert_equal_calls(stock("llama"), model, plain()))


def test_packed_and_tied_heads() -> None:
    model = build("qwen2")
    hf_accel.optimize(
        model, [hf_accel.WeightOnlyConfig(bits=8), DecoderBlockConfig(), KVCacheConfig(), DecodingConfig()]
    )
    host: Any = host_of(model)
    runner = host.doors[Door.FORWARD]
    found: list[Any] = []
    assert served(runner, lambda: found.append(plain()(model))) == NEW - 1
    host.doors = {door: who for door, who in host.doors.items() if door is not Door.FORWARD}
    assert torch.equal(found[0], plain()(model))


def test_threads_do_not_meet() -> None:
    model, _runner = whole("llama")
    prompts = [prompt(1, 5 + n, n) for n in range(4)]
    expected = [stock("llama").generate(ids, max_new_tokens=60, do_sample=False) for ids in prompts]
    found: dict[int, Any] = {}

    def write(number: int) -> None:
        for _ in range(3):
            found[number] = model.generate(prompts[number], max_new_tokens=60, do_sample=False)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], expected[number]) for number in range(4))


def test_a_call_within_a_call() -> None:
    model, _runner = whole("llama")
    inner = prompt(1, 6, 9)
    expected = stock("llama").generate(inner, max_new_tokens=5, do_sample=False)

    class Inner:
        def put(self, value: Any) -> None:
            assert torch.equal(model.generate(inner, max_new_tokens=5, do_sample=False), expected)

        def end(self) -> None:
            pass

    found = plain(do_sample=False, streamer=Inner())(model)
    assert torch.equal(found, plain(do_sample=False)(stock("llama")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_choice_is_the_first_of_the_best(dtype: torch.dtype) -> None:
    """As torch's argmax: the first of equal ones, 0 as -0, NaN before all others."""
    model, runner = whole("llama", dtype)
    step: Any = runner.guard.step
    memory = hf_accel.kernels.native.StepMemory(len(step.blocks), step.hidden)
    rows = torch.tensor([[1.0, 5.0, 5.0], [-0.0, 0.0, -1.0], [-1.0, 0.0, -0.0], [0.0, float("nan"), float("inf")],
                         [float("-inf"), float("-inf"), float("-inf")], [-2.0, -1.0, -1.0]])  # fmt: skip
    head = model.get_output_embeddings()
    for row in rows.repeat(1, 40):
        bias = row.to(dtype)
        with torch.no_grad():
            head.weight.zero_()
        ends = hf_accel.kernels.native.StepEnds(
            **{**vars(step.ends), "head": hf_accel.kernels.native.Projection(head.weight.detach()[:120], bias)}
        )
        biased = hf_accel.kernels.native.NativeStep(step.blocks, ends, step.angles)
        for index, (_, kv_heads, size) in enumerate(runner._parts):
            memory.place(index, *torch.zeros((2, 1, kv_heads, 4, size), dtype=dtype), 0, 0, None)
        memory.choice.zero_()
        logits = biased(memory, 0)
        assert logits is not None
        assert int(memory.choice) == int(logits[0, 0].float().argmax()) == int(bias.float().argmax())
