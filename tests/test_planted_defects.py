"""Each kind of mistake, planted, makes the walk through the space of calls fail: the comparison can see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, find, settings
from space import Request, differs, requests

from hf_accel.attention import grouped, ladder
from hf_accel.cache import buffers
from hf_accel.cache.layers import buffered, growing, sliding
from hf_accel.core.calls.inputs import LeanInputs, StockInputs
from hf_accel.core.drift import CACHE
from hf_accel.decoding import choosing
from hf_accel.decoding.collected import Collected
from hf_accel.decoding.loop import TokenLoop
from hf_accel.kernels.native.block import NativeBlock

Patch = pytest.MonkeyPatch


def lean_inputs_without_mask(patch: Patch) -> None:
    absorb = LeanInputs.absorb

    def wrong(self: Any, outputs: Any) -> None:
        absorb(self, outputs)
        self.inputs.pop("attention_mask", None)

    patch.setattr(LeanInputs, "absorb", wrong)


def mask_grown_by_zeros(patch: Patch) -> None:
    absorb = LeanInputs.absorb

    def wrong(self: Any, outputs: Any) -> None:
        absorb(self, outputs)
        if self.inputs.get("attention_mask") is not None:
            self.inputs["attention_mask"][:, -1] = 0

    patch.setattr(LeanInputs, "absorb", wrong)


def positions_from_the_mask(patch: Patch) -> None:
    absorb = LeanInputs.absorb

    def wrong(self: Any, outputs: Any) -> None:
        absorb(self, outputs)
        mask = self.inputs.get("attention_mask")
        if mask is not None and "position_ids" in self.inputs:
            self.inputs["position_ids"] = mask.cumsum(-1)[:, -1:] - 1

    patch.setattr(LeanInputs, "absorb", wrong)


def positions_that_stand_still(patch: Patch) -> None:
    absorb = LeanInputs.absorb

    def wrong(self: Any, outputs: Any) -> None:
        before = self.inputs.get("position_ids")
        absorb(self, outputs)
        if before is not None:
            self.inputs["position_ids"] = before[..., -1:]

    patch.setattr(LeanInputs, "absorb", wrong)


def in_the_loop(change: Callable[[Any], None]) -> Callable[[Patch], None]:
    """Return a defect that changes the call before our loop runs it."""

    def plant(patch: Patch) -> None:
        run = TokenLoop.run

        def wrong(self: Any, call: Any) -> Any:
            change(call)
            return run(self, call)

        patch.setattr(TokenLoop, "run", wrong)

    return plant


def without_processors(call: Any) -> None:
    call.logits_processor = lambda input_ids, scores: scores


class Blind:
    """Stopping criteria that hide that they end rows."""

    def __init__(self, criteria: Any) -> None:
        self.criteria = criteria

    def __iter__(self) -> Any:
        return iter(())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.criteria(*args, **kwargs)


def without_padding_of_finished_rows(call: Any) -> None:
    call.stopping_criteria = Blind(call.stopping_criteria)


class Forgetful:
    """A streamer that never hands over the last token."""

    def __init__(self, streamer: Any) -> None:
        self.streamer, self.held = streamer, None

    def put(self, value: Any) -> None:
        if self.held is not None:
            self.streamer.put(self.held)
        self.held = value

    def end(self) -> None:
        self.streamer.end()


def without_the_last_token_streamed(call: Any) -> None:
    call.streamer = call.streamer and Forgetful(call.streamer)


def without_the_cache_returned(call: Any) -> None:
    call.model_kwargs.pop(CACHE, None)


def two_draws(patch: Patch) -> None:
    patch.setattr(choosing, "selected", lambda *_: None)
    choose = choosing.choose_token
    patch.setattr(
        choosing, "choose_token", lambda scores, samples: (choose(scores, samples), choose(scores, samples))[1]
    )


def greedy_always(patch: Patch) -> None:
    patch.setattr(choosing, "selected", lambda *_: None)
    patch.setattr(choosing, "choose_token", lambda scores, samples: scores.argmax(-1))


def raw_logits_as_scores(patch: Patch) -> None:
    add = Collected.add
    patch.setattr(Collected, "add", lambda self, step: add(self, replace(step, scores=step.logits)))


def keyword_dropped(patch: Patch) -> None:
    following = StockInputs.next

    def wrong(self: Any, outputs: Any, input_ids: torch.Tensor) -> Any:
        self.model_kwargs.pop("token_type_ids", None)
        return following(self, outputs, input_ids)

    patch.setattr(StockInputs, "next", wrong)


def lean_inputs_for_everything(patch: Patch) -> None:
    patch.setattr(LeanInputs, "fit", staticmethod(lambda model, model_kwargs, outputs: CACHE in model_kwargs))


def append_off_by_one(patch: Patch) -> None:
    append = buffers.Buffers.append

    def wrong(self: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
        append(self, keys.roll(1, dims=2) if keys.shape[2] > 1 else keys, values)

    patch.setattr(buffers.Buffers, "append", wrong)


def append_over_the_last_token(patch: Patch) -> None:
    append = buffers.Buffers.append

    def wrong(self: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
        append(self, keys, values)
        if self.stop > keys.shape[2]:
            self.values[:, :, self.stop - keys.shape[2] - 1] = values[:, :, 0]

    patch.setattr(buffers.Buffers, "append", wrong)


def reserve_off_by_one(patch: Patch) -> None:
    reserve = buffered.BufferedLayer.reserve

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = reserve(self, *args, **kwargs)
        if found is None or found[2] == 0:
            return found
        found[0][:, :, found[2] - 1] = 0.0
        return found

    patch.setattr(buffered.BufferedLayer, "reserve", wrong)


def crop_one_too_few(patch: Patch) -> None:
    crop = growing.GrowingLayer.crop
    patch.setattr(growing.GrowingLayer, "crop", lambda self, tokens: crop(self, min(0, tokens + 1)))


def window_off_by_one(patch: Patch) -> None:
    patch.setattr(
        sliding.GrowingSlidingLayer, "_slide",
        lambda self, tokens: (setattr(self, "cumulative_length", self.cumulative_length + tokens),
                              self.buffers.values[:, :, max(0, self.buffers.stop - 3)].zero_()),
    )  # fmt: skip


def beams_not_reordered(patch: Patch) -> None:
    patch.setattr(buffered.BufferedLayer, "reorder_cache", lambda self, beam_idx: None)


def grouped_attention_without_mask(patch: Patch) -> None:
    patch.setattr(ladder, "grouped_gain", lambda *_: 2.0)  # whatever a busy machine shows
    attention = grouped.grouped_attention
    patch.setattr(grouped, "grouped_attention", lambda q, k, v, mask, scale: attention(q, k, v, None, scale))


def grouped_attention_with_other_groups(patch: Patch) -> None:
    patch.setattr(ladder, "grouped_gain", lambda *_: 2.0)
    attention = grouped.grouped_attention
    patch.setattr(
        grouped, "grouped_attention", lambda q, k, v, mask, scale: attention(q, k.flip(1), v.flip(1), mask, scale)
    )


def native_layer_without_mask(patch: Patch) -> None:
    call = NativeBlock.__call__

    def wrong(self, hidden, cos, sin, keys, values, past, first=0, mask=None, *rest):
        return call(self, hidden, cos, sin, keys, values, past, first, None, *rest)

    patch.setattr(NativeBlock, "__call__", wrong)


def native_layer_at_another_position(patch: Patch) -> None:
    call = NativeBlock.__call__

    def wrong(self, hidden, cos, sin, keys, values, past, first=0, mask=None, *rest):
        ones, zeros = torch.ones_like(cos), torch.zeros_like(sin)
        return call(self, hidden, ones, zeros, keys, values, past, first, mask, *rest)

    patch.setattr(NativeBlock, "__call__", wrong)


DEFECTS: dict[Callable[[Patch], None], str] = {
    lean_inputs_without_mask: "bitnet",
    mask_grown_by_zeros: "llama",
    positions_from_the_mask: "llama",
    positions_that_stand_still: "gemma3",
    in_the_loop(without_processors): "llama",
    in_the_loop(without_padding_of_finished_rows): "gpt2",
    in_the_loop(without_the_last_token_streamed): "gpt2",
    in_the_loop(without_the_cache_returned): "llama",
    two_draws: "llama",
    greedy_always: "gemma3",
    raw_logits_as_scores: "gpt2",
    keyword_dropped: "gpt2",
    lean_inputs_for_everything: "gpt2",
    append_off_by_one: "bitnet",
    append_over_the_last_token: "bitnet",
    reserve_off_by_one: "llama",
    crop_one_too_few: "bitnet",
    window_off_by_one: "gemma3",
    beams_not_reordered: "gpt2",
    grouped_attention_without_mask: "bitnet",
    grouped_attention_with_other_groups: "bitnet",
    native_layer_without_mask: "llama",
    native_layer_at_another_position: "gemma3",
}
PLAIN = ["greedy", "sample"]
STRATEGIES = {crop_one_too_few: ["lookup", "draft"], beams_not_reordered: ["beams"]}
NATIVE = {reserve_off_by_one, native_layer_without_mask, native_layer_at_another_position}
WALK = settings(max_examples=120, phases=[Phase.generate])


def title(defect: Any) -> str:
    return (
        getattr(defect, "__name__", "")
        if "plant" not in defect.__name__
        else defect.__closure__[0].cell_contents.__name__
    )


@pytest.mark.parametrize(
    "defect,name",
    [pytest.param(d, n, id=title(d), marks=[pytest.mark.native] if d in NATIVE else []) for d, n in DEFECTS.items()],
)
def test_a_planted_defect_is_seen(defect: Callable[[Patch], None], name: str, monkeypatch: Patch) -> None:
    with monkeypatch.context() as patch:
        defect(patch)
        request: Request = find(
            requests([name], STRATEGIES.get(defect, PLAIN)), differs, settings=WALK
        )  # raises NoSuchExample when unseen
    assert not differs(request), "the request differs without the defect, too"
