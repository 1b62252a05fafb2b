"""Models that prepare inputs in a way of their own: drafts where these follow from one another, else stock's path."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import TINY, build, padded, prompt, randomize
from speculating import always, counts, total
from transformers import AutoConfig, Phi3ForCausalLM

import hf_accel
from hf_accel.core.calls.following import OTHERWISE, Following
from hf_accel.core.drift import CACHE

ASKED: dict[str, Any] = {"max_new_tokens": 16, "suppress_tokens": list(range(7, 128))}


def beneath(model: Any) -> Any:
    """Return what the methods given to `own` are put over."""
    return super([cls for cls in type(model).__mro__ if cls.__name__ == "Own"][-1], model)


def own(name: str, **methods: Any) -> Any:
    """Return a model of a class of its own, with these methods."""
    model = build(name)
    model.__class__ = type("Own", (type(model),), methods)
    return model


def assert_text(model: Any, reason: str | None = None, batch: bool = True, **given: Any) -> Any:
    """Compare text and random numbers with the model's before; drafts in every call, or `reason` for none in any."""
    stock = copy.deepcopy(model)
    hf_accel.optimize(model, [always("lookup")])
    calls = [{"input_ids": prompt(1, 6)}, {"input_ids": prompt(1, 9), "do_sample": True}]
    calls += [padded([9, 3, 5, 7])] if batch else []
    for call in calls:
        found = []
        for one in (stock, model):
            torch.manual_seed(2)
            found.append((one.generate(**{"do_sample": False, **ASKED, **given, **call}), torch.get_rng_state()))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])
    report = counts(model)
    assert report["plain_calls"] == ({} if reason is None else {reason: len(calls)})
    assert reason is not None or total(report, "accepted")
    return stock


def test_a_method_of_its_own_that_changes_nothing() -> None:
    def prepare(self: Any, input_ids: Any, **kwargs: Any) -> Any:
        return beneath(self).prepare_inputs_for_generation(input_ids, **kwargs)

    assert_text(own("llama", prepare_inputs_for_generation=prepare))


def test_inputs_that_the_user_adds() -> None:
    """Of which each token has its own, the last of the prompt for all that follow."""
    model = build("gpt2")
    stock = copy.deepcopy(model)
    hf_accel.optimize(model, [always("lookup")])
    given = {"token_type_ids": torch.tensor([[3, 4, 5, 6, 3, 9]]), "do_sample": False, **ASKED}
    texts = [one.generate(prompt(1, 6), **given) for one in (stock, model)]
    assert torch.equal(*texts)
    assert not torch.equal(texts[0], stock.generate(prompt(1, 6), do_sample=False, **ASKED)), "they decide nothing"
    assert total(counts(model), "accepted")
    assert not counts(model)["plain_calls"]


def phi3(switch: int) -> Any:
    """Return a model that reads all its text anew where that becomes longer than `switch` tokens."""
    config = AutoConfig.for_model("phi3", **(TINY["phi3"].config | {"original_max_position_embeddings": switch}))
    model = Phi3ForCausalLM(config).eval()
    randomize(model, TINY["phi3"])
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


@pytest.mark.parametrize("switch", [24, 64])
def test_inputs_that_change_beyond_the_call(switch: int) -> None:
    """Texts are of 22 to 25 tokens, the last of which is not taken in."""
    assert_text(phi3(switch))


@pytest.mark.parametrize("switch", [12, 16, 17, 18, 19, 20, 21])
def test_inputs_that_change_at_a_length(switch: int) -> None:
    """Until then there are drafts; what follows is written as stock writes it, batches from the beginning."""
    stock, model = (phi3(switch) for _ in range(2))
    hf_accel.optimize(model, [always("lookup")])
    calls = [{"input_ids": prompt(1, 6)}, {"input_ids": prompt(1, 9), "do_sample": True}, padded([9, 3, 5, 7])]
    for number, call in enumerate(calls):
        found = []
        for one in (stock, model):
            torch.manual_seed(2)
            given = {"do_sample": False, **ASKED, "return_dict_in_generate": number == 0, **call}
            made = one.generate(**given)
            found.append((made if number else made.sequences, torch.get_rng_state()))
            if not number:
                assert made[CACHE].get_seq_length() == 21
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])
    report = counts(model)
    assert report["calls"] == 2
    assert total(report, "proposed")
    assert report["plain_calls"] == {"the model's inputs change before the batch ends": 1}


def odd_positions(self: Any, input_ids: Any, **kwargs: Any) -> Any:
    inputs = beneath(self).prepare_inputs_for_generation(input_ids, **kwargs)
    inputs["position_ids"] = inputs["position_ids"] + input_ids.shape[1] % 2
    return inputs


def tokens_of_its_own(self: Any, input_ids: Any, **kwargs: Any) -> Any:
    inputs = beneath(self).prepare_inputs_for_generation(input_ids, **kwargs)
    inputs["input_ids"] = inputs["input_ids"].clamp(max=5)
    return inputs


def mask_of_its_own(self: Any, input_ids: Any, **kwargs: Any) -> Any:
    inputs = beneath(self).prepare_inputs_for_generation(input_ids, **kwargs)
    if inputs.get("attention_mask") is None:
        inputs["attention_mask"] = torch.ones_like(input_ids)
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][:, -3:-1] = 0
    return inputs


def no_more_than_one_token(self: Any, input_ids: Any, **kwargs: Any) -> Any:
    if kwargs.get("next_sequence_length") == 2:
        raise NotImplementedError
    return beneath(self).prepare_inputs_for_generation(input_ids, **kwargs)


@pytest.mark.parametrize("method", [odd_positions, tokens_of_its_own, mask_of_its_own, no_more_than_one_token])
def test_inputs_that_do_not_follow(method: Callable[..., Any]) -> None:
    assert_text(own("llama", prepare_inputs_for_generation=method), OTHERWISE)


def counted(self: Any, input_ids: Any, **kwargs: Any) -> Any:
    self.passes = getattr(self, "passes", 0) + 1
    return beneath(self).prepare_inputs_for_generation(input_ids, **kwargs)


def drawn(self: Any, input_ids: Any, **kwargs: Any) -> Any:
    torch.rand(1)
    return beneath(self).prepare_inputs_for_generation(input_ids, **kwargs)


@pytest.mark.parametrize("method", [counted, drawn])
def test_a_method_that_leaves_traces_is_not_asked_ahead_of_time(method: Callable[..., Any]) -> None:
    model = own("llama", prepare_inputs_for_generation=method)
    stock = assert_text(model, "preparing the model's inputs changes the model")
    assert getattr(model, "passes", 0) == getattr(stock, "passes", 0)


def test_a_method_that_writes_to_what_it_is_given() -> None:
    """Asking it ahead of time must not move what the call is given."""

    def prepare(self: Any, input_ids: Any, window: Any = None, **kwargs: Any) -> Any:
        inputs = beneath(self).prepare_inputs_for_generation(input_ids, **kwargs)
        inputs["position_ids"] = inputs["position_ids"] + window
        window += 1
        return inputs

    model = own("llama", prepare_inputs_for_generation=prepare)
    stock = copy.deepcopy(model)
    hf_accel.optimize(model, [always("lookup")])
    windows = [torch.zeros(1, dtype=torch.long) for _ in range(2)]
    given = {"do_sample": False, **ASKED}
    texts = [
        one.generate(prompt(1, 6), window=each, **given) for one, each in zip((stock, model), windows, strict=True)
    ]
    assert torch.equal(*texts)
    assert torch.equal(*windows)
    assert counts(model)["plain_calls"] == {OTHERWISE: 1}


def test_what_no_later_pass_may_be_asked_for() -> None:
    """A source of inputs that is used up by asking."""

    def prepare(self: Any, input_ids: Any, source: Any = None, **kwargs: Any) -> Any:
        inputs = beneath(self).prepare_inputs_for_generation(input_ids, **kwargs)
        inputs["position_ids"] = inputs["position_ids"] + next(source)
        return inputs

    model = own("llama", prepare_inputs_for_generation=prepare)
    stock = copy.deepcopy(model)
    hf_accel.optimize(model, [always("lookup")])
    texts = [one.generate(prompt(1, 6), source=iter([0] * 40), do_sample=False, **ASKED) for one in (stock, model)]
    assert torch.equal(*texts)
    assert counts(model)["plain_calls"] == {OTHERWISE: 1}


def extra(self: Any, input_ids: Any, **kwargs: Any) -> Any:
    return beneath(self).prepare_inputs_for_generation(input_ids, **kwargs) | {"extra": 2}


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_inputs_that_setting_up_did_not_try(name: str) -> None:
    """Are tried in the first call, which leaves caches with windows, rows apart or not, as they were."""

    def forward(
        self: Any,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        extra: int = 1,
        **rest: Any,
    ) -> Any:
        outputs = beneath(self).forward(input_ids, attention_mask, position_ids, **rest)
        outputs.logits = outputs.logits * extra
        return outputs

    assert_text(own(name, prepare_inputs_for_generation=extra, forward=forward))


@pytest.mark.parametrize("widths, reason", [((3,), "steps of several tokens give other logits than single ones")])
def test_steps_that_differ_with_new_inputs(widths: tuple[int, ...], reason: str) -> None:
    def forward(self: Any, input_ids: Any = None, extra: int = 1, **kwargs: Any) -> Any:
        outputs = beneath(self).forward(input_ids, **kwargs)
        if extra > 1 and 1 < input_ids.shape[1] < 6:
            outputs.logits = outputs.logits.flip(-1)
        return outputs

    model = own("llama", prepare_inputs_for_generation=extra, forward=forward)
    assert_text(model, f"{reason}, with extra", batch=False)


def test_steps_that_fail_with_new_inputs() -> None:
    def forward(self: Any, input_ids: Any = None, extra: int = 1, **kwargs: Any) -> Any:
        outputs = beneath(self).forward(input_ids, **kwargs)
        if extra > 1 and 1 < input_ids.shape[1] < 6:
            raise RuntimeError("one token, please")
        return outputs

    model = own("llama", prepare_inputs_for_generation=extra, forward=forward)
    reason = "steps of several tokens fail: RuntimeError: one token, please, with extra"
    assert_text(model, reason, batch=False)


def test_a_kind_is_what_differs_from_text() -> None:
    plain = Following(None, torch.tensor([3]), {"use_cache": True, "token_type_ids": None})
    assert not plain.kind
    several = Following(None, torch.tensor([[3], [4]]), {"grid": torch.ones(1)})
    assert several.kind == {"2 axes of positions", "grid"}
