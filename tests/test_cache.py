"""The growing cache layers behave as transformers' dynamic ones, step by step, whatever is done to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_accel.cache.buffers import MINIMUM_TOKENS
from hf_accel.cache.layers.growing import GrowingLayer
from hf_accel.cache.layers.sliding import GrowingSlidingLayer

HEADS, SIZE, VALUE_SIZE = 2, 6, 6


class Twins(RuleBasedStateMachine):
    """A stock layer and ours, given the same calls; `sliding` is the window, None for full attention."""

    sliding: int | None = None

    @initialize(batch=st.integers(1, 3), expected=st.sampled_from([0, 5, 100]), recording=st.booleans())
    def start(self, batch: int, expected: int, recording: bool) -> None:
        self.batch, self.seed = batch, 0
        self.stock: Any
        self.ours: Any
        if self.sliding is None:
            self.stock, self.ours = DynamicLayer(), GrowingLayer(expected)
        else:
            self.stock, self.ours = DynamicSlidingWindowLayer(self.sliding), GrowingSlidingLayer(self.sliding, expected)
            if recording:
                self.record()

    def states(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        keys = torch.randn(self.batch, HEADS, tokens, SIZE, generator=generator)
        return keys, torch.randn(self.batch, HEADS, tokens, VALUE_SIZE, generator=generator)

    def record(self) -> None:
        self.stock.activate_past_recording()
        self.ours.activate_past_recording()

    def both(self, call: Any) -> None:
        """Call both; the same kind of error or the same result."""
        results = []
        for layer in (self.stock, self.ours):
            try:
                results.append(call(layer))
            except Exception as error:
                results.append(type(error))
        if isinstance(results[0], type) or isinstance(results[1], type):
            assert results[0] is results[1], results

    @rule(tokens=st.sampled_from([1, 1, 1, 2, 3, 7, 70]))
    def update(self, tokens: int) -> None:
        keys, values = self.states(tokens)
        expected = self.stock.update(keys.clone(), values.clone())
        found = self.ours.update(keys, values)
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a, b)
        keys.fill_(9e9)  # the layer must not keep the caller's tensors
        values.fill_(9e9)

    @rule(tokens=st.sampled_from([1, 1, 2, 5]))
    def append_by_a_kernel(self, tokens: int) -> None:
        """What `reserve` and `commit` promise: writing into the buffers is an update."""
        keys, values = self.states(tokens)
        expected = self.stock.update(keys, values)
        reserved = self.ours.reserve(self.batch, tokens, HEADS, SIZE, keys.dtype, keys.device)
        assert reserved is not None
        key_buffer, value_buffer, past, first, rows, own = reserved
        assert own is None
        assert rows is None
        assert key_buffer.shape[2] >= past + tokens
        key_buffer[:, :, past : past + tokens] = keys
        value_buffer[:, :, past : past + tokens] = values
        assert torch.equal(key_buffer[:, :, first : past + tokens], expected[0])
        assert torch.equal(value_buffer[:, :, first : past + tokens], expected[1])
        self.ours.commit(tokens)

    @rule(tokens=st.integers(0, 4))
    def crop(self, tokens: int) -> None:
        if self.stock.is_initialized and tokens <= int(self.stock.get_seq_length()):  # else stock's window layers fail
            self.both(lambda layer: layer.crop(-tokens))

    @rule(length=st.integers(1, 5))
    def crop_to_a_positive_length_is_refused(self, length: int) -> None:
        if self.stock.is_initialized:
            self.both(lambda layer: layer.crop(length))

    @precondition(lambda self: self.stock.is_initialized)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        order = torch.tensor(
            data.draw(st.lists(st.integers(0, self.batch - 1), min_size=self.batch, max_size=self.batch))
        )
        self.both(lambda layer: layer.reorder_cache(order))

    @precondition(lambda self: self.batch <= 4)
    @rule(repeats=st.integers(1, 2))
    def repeat(self, repeats: int) -> None:
        if self.stock.is_initialized and self.stock.get_seq_length():
            self.both(lambda layer: layer.batch_repeat_interleave(repeats))
            self.batch *= repeats

    @precondition(lambda self: self.batch > 1)
    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        if self.stock.is_initialized and self.stock.get_seq_length():
            kept = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=self.batch, unique=True))
            self.both(lambda layer: layer.batch_select_indices(torch.tensor(kept)))
            self.batch = len(kept)

    @rule()
    def reset(self) -> None:
        self.stock.reset()
        self.ours.reset()

    @precondition(lambda self: self.sliding is not None)
    @rule()
    def start_recording(self) -> None:
        self.record()

    @invariant()
    def equal(self) -> None:
        if not hasattr(self, "stock"):
            return
        stock, ours = self.stock, self.ours
        assert int(ours.get_seq_length()) == int(stock.get_seq_length())
        assert ours.get_max_length() == stock.get_max_length()
        assert ours.is_croppable == stock.is_croppable
        for query in (1, 4):
            assert ours.get_mask_sizes(query) == stock.get_mask_sizes(query)
        assert ours.is_initialized == stock.is_initialized
        if stock.is_initialized and stock.keys.numel() and not getattr(stock, "record_past", False):
            # while the past is recorded each keeps as much as it needs; the results of `update` tell the difference
            assert torch.equal(ours.keys, stock.keys)
            assert torch.equal(ours.values, stock.values)


class SlidingTwins(Twins):
    sliding = 5


class WideWindowTwins(Twins):
    sliding = 64


class NarrowWindowTwins(Twins):
    sliding = 2


TestFull = Twins.TestCase
TestSliding = SlidingTwins.TestCase
TestWideWindow = WideWindowTwins.TestCase
TestNarrowWindow = NarrowWindowTwins.TestCase
TestFull.settings = settings(max_examples=120, stateful_step_count=40)
TestSliding.settings = TestWideWindow.settings = TestNarrowWindow.settings = TestFull.settings


def filled(layer: Any, tokens: int, step: int = 1) -> Any:
    for _ in range(tokens // step):
        layer.update(torch.ones(1, HEADS, step, SIZE), torch.ones(1, HEADS, step, SIZE))
    return layer


@pytest.mark.parametrize("tokens", [1, 50, 65, 300, 1000])
def test_memory_is_within_the_documented_bound(tokens: int) -> None:
    """At most 1.5 times the bytes in use, or the minimum; with an expectation, that many tokens but no waste."""
    layer = filled(GrowingLayer(), tokens)
    assert layer.buffers.keys.shape[2] <= max(1.5 * tokens, MINIMUM_TOKENS)
    layer = filled(GrowingLayer(expected_tokens=tokens), tokens)
    assert layer.buffers.keys.shape[2] <= max(1.5 * tokens, MINIMUM_TOKENS, 4)
    short = filled(GrowingLayer(expected_tokens=100_000), 8, step=8)
    assert short.buffers.keys.shape[2] <= MINIMUM_TOKENS, "a large maximum must not reserve memory that is never used"


def test_memory_of_a_window_does_not_grow_with_the_text() -> None:
    layer = filled(GrowingSlidingLayer(16, expected_tokens=5000), 2000)
    assert layer.buffers.keys.shape[2] <= max(MINIMUM_TOKENS, 4 * 16)


def test_appending_copies_rarely() -> None:
    layer = GrowingLayer()
    buffers = set()
    kept = []  # keeps every buffer alive, so that addresses are not used twice
    for _ in range(1000):
        filled(layer, 1)
        kept.append(layer.buffers.keys)
        buffers.add(layer.buffers.keys.data_ptr())
    assert len(buffers) <= 10


def test_dropping_tokens_moves_nothing() -> None:
    layer = filled(GrowingLayer(), 100)
    buffer, version = layer.buffers.keys, layer.buffers.keys._version
    layer.crop(-40)
    assert layer.buffers.keys is buffer
    assert buffer._version == version
    assert layer.get_seq_length() == 60


@pytest.mark.parametrize("make", [GrowingLayer, lambda: GrowingSlidingLayer(8)])
def test_what_does_not_fit_fails_or_joins_as_in_stock(make: Any) -> None:
    stock = DynamicLayer() if make is GrowingLayer else DynamicSlidingWindowLayer(8)
    ours = make()
    first = torch.randn(2, HEADS, 3, SIZE)
    for layer in (stock, ours):
        layer.update(first, first)
    for other in (
        torch.randn(1, HEADS, 1, SIZE),
        torch.randn(2, HEADS + 1, 1, SIZE),
        torch.randn(2, HEADS, 1, SIZE + 1),
    ):
        for layer in (stock, ours):
            with pytest.raises(RuntimeError):
                layer.update(other, other)


def test_gradients_flow_through_the_cache() -> None:
    grads = []
    for layer in (DynamicLayer(), GrowingLayer()):
        keys = torch.randn(1, HEADS, 3, SIZE, generator=torch.Generator().manual_seed(0)).requires_grad_()
        layer.update(keys, keys)
        found, _ = layer.update(keys * 2, keys)
        found.square().sum().backward()
        grads.append(keys.grad)
    assert torch.equal(*grads)


def test_reserve_refuses_what_it_cannot_take() -> None:
    layer = filled(GrowingLayer(), 3)
    assert layer.reserve(2, 1, HEADS, SIZE, torch.float32, torch.device("cpu")) is None
    assert layer.reserve(1, 1, HEADS + 1, SIZE, torch.float32, torch.device("cpu")) is None
    assert layer.reserve(1, 1, HEADS, SIZE, torch.bfloat16, torch.device("cpu")) is None
    assert layer.reserve(1, 100, HEADS, SIZE * 2, torch.float32, torch.device("cpu")) is None
    assert layer.get_seq_length() == 3
    mixed = GrowingLayer()
    mixed.update(torch.randn(1, HEADS, 3, SIZE), torch.randn(1, HEADS, 3, SIZE))
    mixed.values = mixed.values.bfloat16()  # a kernel would write fp32 into them
    for tokens in (1, 100):
        for dtype in (torch.float32, torch.bfloat16):
            assert mixed.reserve(1, tokens, HEADS, SIZE, dtype, torch.device("cpu")) is None


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("key_dtypes", ["fff", "fbf", "bbf"])
@pytest.mark.parametrize("value_dtypes", ["bbf", "bfb", "fbb"])
def test_other_dtypes_join_as_in_stock(window: int | None, key_dtypes: str, value_dtypes: str) -> None:
    """Autocast leaves keys in fp32 and values in bf16; a step may come from outside it."""
    stock = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
    ours = GrowingLayer() if window is None else GrowingSlidingLayer(window)
    kinds = {"f": torch.float32, "b": torch.bfloat16}
    for tokens, key, value in zip((5, 100, 1), key_dtypes, value_dtypes, strict=True):
        keys, values = (torch.randn(1, HEADS, tokens, SIZE).to(kinds[kind]) for kind in (key, value))
        for expected, found in zip(stock.update(keys, values), ours.update(keys, values), strict=True):
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)
        assert (ours.keys.dtype, ours.values.dtype) == (stock.keys.dtype, stock.values.dtype)


@pytest.mark.parametrize("make", [GrowingLayer, lambda: GrowingSlidingLayer(8)])
def test_inference_tensors_are_gone_on_with(make: Any) -> None:
    layer = make()
    with torch.inference_mode():
        filled(layer, 5)
    before = layer.keys.clone()
    filled(layer, 1)
    assert torch.equal(layer.keys[:, :, :5], before)
    with torch.inference_mode():
        filled(layer, 1)
    assert layer.get_seq_length() == 7
