"""Cache layers with codes are the layers without that are given what codes read as, to the last bit, step by step."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_speculation_cache import HEADS, SIZE, Apart, unwritten_is_nan

from hf_accel.cache.buffers import MINIMUM_TOKENS, Buffers
from hf_accel.cache.codec import AS_IS, Codec
from hf_accel.cache.layers.growing import GrowingLayer
from hf_accel.cache.layers.sliding import GrowingSlidingLayer
from hf_accel.core.calls.held import CachedStates
from hf_accel.kernels import native
from hf_accel.ops import cached

__all__ = ["unwritten_is_nan"]  # the fixture
SHAPES = [(6, 6), (6, 10), (64, 64)]  # head sizes of keys and values


def rounded(states: torch.Tensor, bits: int, is_key: bool) -> torch.Tensor:
    rows = cached.encode(states, bits, is_key=is_key)
    return cached.decode(rows, bits, states.shape[-1], states.dtype, is_key=is_key)


def make(window: int | None, expected: int, bits: int | None) -> Any:
    codec = AS_IS if bits is None else Codec(bits)
    return GrowingLayer(expected, codec) if window is None else GrowingSlidingLayer(window, expected, codec)


class Twins(RuleBasedStateMachine):
    """A layer with codes, and one without that is given what the codes read as."""

    window: int | None = None

    @initialize(
        batch=st.integers(1, 3),
        expected=st.sampled_from([0, 5, 100]),
        bits=st.sampled_from([8, 4]),
        sizes=st.sampled_from(SHAPES),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        recording=st.booleans(),
    )
    def start(
        self, batch: int, expected: int, bits: int, sizes: tuple[int, int], dtype: torch.dtype, recording: bool
    ) -> None:
        self.batch, self.bits, self.sizes, self.dtype, self.seed = batch, bits, sizes, dtype, 0
        self.plain, self.coded = (make(self.window, expected, kind) for kind in (None, bits))
        if recording and self.window is not None:
            self.record()

    def record(self) -> None:
        for layer in (self.plain, self.coded):
            layer.activate_past_recording()

    def states(self, tokens: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return keys and values, and what they read as."""
        self.seed += 1
        made = torch.Generator().manual_seed(self.seed)
        given = [torch.randn(self.batch, HEADS, tokens, d, generator=made).to(self.dtype) for d in self.sizes]
        return given, [rounded(x, self.bits, i == 0) for i, x in enumerate(given)]

    def both(self, call: Any) -> None:
        """Call both; the same kind of error, or none."""
        results = []
        for layer in (self.plain, self.coded):
            try:
                results.append(call(layer))
            except (ValueError, RuntimeError) as error:
                results.append(type(error))
        assert isinstance(results[0], type) is isinstance(results[1], type), results

    @rule(tokens=st.sampled_from([1, 1, 1, 2, 3, 7, 70]))
    def update(self, tokens: int) -> None:
        states, read = self.states(tokens)
        expected, found = self.plain.update(*read), self.coded.update(*states)
        for x in states:
            x.fill_(9e9)  # the layer must not keep the caller's tensors
        for ours, theirs in zip(found, expected, strict=True):
            assert isinstance(ours, CachedStates)
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            assert torch.equal(ours, theirs)

    @precondition(lambda self: self.sizes[0] == self.sizes[1])
    @rule(tokens=st.sampled_from([1, 1, 2, 5]))
    def append_by_a_kernel(self, tokens: int) -> None:
        states, read = self.states(tokens)
        wanted = (self.batch, tokens, HEADS, self.sizes[0], self.dtype, torch.device("cpu"))
        reserved = self.coded.reserve(*wanted)
        assert reserved is not None
        expected = self.plain.reserve(*wanted)
        assert reserved[2:] == expected[2:]
        for place, (rows, buffer, ours, theirs) in enumerate(
            zip(reserved[:2], expected[:2], states, read, strict=True)
        ):
            assert rows.dtype is torch.uint8
            at = slice(reserved[2], reserved[2] + tokens)
            rows[:, :, at] = cached.encode(ours, self.bits, is_key=place == 0)
            buffer[:, :, at] = theirs
        self.plain.commit(tokens)
        self.coded.commit(tokens)

    @rule(tokens=st.integers(0, 4))
    def crop(self, tokens: int) -> None:
        if self.plain.is_initialized and tokens <= int(self.plain.get_seq_length()):
            self.both(lambda layer: layer.crop(-tokens))

    @rule(length=st.integers(1, 5))
    def crop_to_a_positive_length_is_refused(self, length: int) -> None:
        if self.plain.is_initialized:
            self.both(lambda layer: layer.crop(length))

    @precondition(lambda self: self.plain.is_initialized)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        rows = st.lists(st.integers(0, self.batch - 1), min_size=self.batch, max_size=self.batch)
        order = torch.tensor(data.draw(rows))
        self.both(lambda layer: layer.reorder_cache(order))

    def is_filled(self) -> bool:
        return self.plain.is_initialized and self.plain.get_seq_length() and self.plain.keys.shape[2]

    @precondition(lambda self: self.batch <= 4)
    @rule(repeats=st.integers(1, 2))
    def repeat(self, repeats: int) -> None:
        if self.is_filled():
            self.both(lambda layer: layer.batch_repeat_interleave(repeats))
            self.batch *= repeats

    @precondition(lambda self: self.batch > 1)
    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        if self.is_filled():
            kept = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=self.batch, unique=True))
            self.both(lambda layer: layer.batch_select_indices(torch.tensor(kept)))
            self.batch = len(kept)

    @rule()
    def reset(self) -> None:
        self.plain.reset()
        self.coded.reset()

    @precondition(lambda self: self.window is not None)
    @rule()
    def start_recording(self) -> None:
        self.record()

    @invariant()
    def equal(self) -> None:
        if not hasattr(self, "plain"):
            return
        plain, coded = self.plain, self.coded
        assert (plain.bits, coded.bits) == (None, self.bits)
        assert coded.is_initialized == plain.is_initialized
        assert coded.get_seq_length() == plain.get_seq_length()
        assert coded.get_mask_sizes(3) == plain.get_mask_sizes(3)
        for name in ("keys", "values"):
            ours, theirs = getattr(coded, name), getattr(plain, name)
            assert (ours is None) is (theirs is None)
            if ours is not None:
                assert ours.dtype is theirs.dtype
                assert torch.equal(ours, theirs)
        if coded.buffers.keys is not None:
            assert coded.buffers.keys.shape[:3] == plain.buffers.keys.shape[:3]
            sizes = [cached.row_bytes(self.bits, size) for size in self.sizes]
            assert [coded.buffers.keys.shape[3], coded.buffers.values.shape[3]] == sizes


class SlidingTwins(Twins):
    window = 5


class WideWindowTwins(Twins):
    window = 64


TestFull = Twins.TestCase
TestSliding = SlidingTwins.TestCase
TestWideWindow = WideWindowTwins.TestCase
TestFull.settings = settings(max_examples=60, stateful_step_count=40)
TestSliding.settings = TestWideWindow.settings = TestFull.settings


class CodedApart(Apart):
    """Rows of different length in a layer with codes; each stock layer is given what the codes read as."""

    def __init__(self, batch: int, window: int | None, expected: int, seed: int, bits: int) -> None:
        super().__init__(batch, window, expected, seed)
        self.bits = bits
        self.ours.buffers = Buffers(Codec(bits), self.ours.buffers.room)
        for layer in self.rows:
            layer.update = partial(self.update_rounded, layer.update)

    def update_rounded(self, update: Any, keys: torch.Tensor, values: torch.Tensor) -> Any:
        return update(rounded(keys, self.bits, True), rounded(values, self.bits, False))

    def _by_kernel(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[list[int], Any, int]:
        tokens = keys.shape[2]
        reserved = self.ours.reserve(len(self.rows), tokens, HEADS, SIZE, keys.dtype, keys.device)
        assert reserved is not None
        *buffers, past, first, rows, _ = reserved
        pasts = [past] * len(self.rows) if rows is None else rows.tolist()
        found = []
        for place, (buffer, states) in enumerate(zip(buffers, (keys, values), strict=True)):
            coded = cached.encode(states, self.bits, is_key=place == 0)
            for row, start in enumerate(pasts):
                buffer[row, :, start : start + tokens] = coded[row]
            seen = buffer[:, :, first : past + tokens]
            found.append(cached.decode(seen, self.bits, SIZE, keys.dtype, is_key=place == 0))
        self.ours.commit(tokens)
        return pasts, found, first


@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("kernels", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("window", [None, 2, 5, 40])
@pytest.mark.parametrize("bits", [8, 4])
def test_every_row_sees_what_it_would_see_alone(bits: int, window: int | None, kernels: float) -> None:
    for seed in range(3):
        layers = CodedApart(1 + seed, window, (0, 30, 400)[seed], seed, bits)
        layers.begin(1 + 7 * seed)
        layers.walk(25, kernels)


@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("kernels", [0.0, 1.0])
@pytest.mark.parametrize("bits", [8, 4])
def test_buffers_grow_while_rows_are_apart(bits: int, kernels: float) -> None:
    layers = CodedApart(2, None, 0, 3, bits)
    layers.begin(40)
    layers.step(5, bool(kernels))
    layers.keep([40, 44])
    before = layers.ours.buffers.keys.shape[2]
    for _ in range(8):  # the shorter row never reaches where the longer one has been
        lengths = layers.lengths
        layers.step(5, bool(kernels))
        layers.keep([lengths[0] + 1, lengths[1] + 5])
    assert layers.ours.buffers.keys.shape[2] > before


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_in_step_again_are_a_plain_layer(bits: int, window: int | None) -> None:
    layers = CodedApart(2, window, 0, 2, bits)
    layers.begin(9)
    layers.step(4, False)
    layers.keep([10, 13])
    layers.ours.crop(0)
    assert layers.ours.buffers.rows is None
    assert layers.ours.get_seq_length() == 13


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("window", [None, 8])
def test_assigned_keys_and_values_are_kept_as_rows(window: int | None, bits: int) -> None:
    layer = make(window, 0, bits)
    layer.update(torch.randn(2, 2, 3, 6), torch.randn(2, 2, 3, 6))
    keys, values = torch.randn(1, 2, 5, 12).bfloat16(), torch.randn(1, 2, 5, 8).half()
    layer.keys, layer.values = keys, values
    assert layer.buffers.keys.shape == (1, 2, 5, cached.row_bytes(bits, 12))
    assert layer.buffers.values.shape == (1, 2, 5, cached.row_bytes(bits, 8))
    assert torch.equal(layer.keys, rounded(keys, bits, True))
    assert torch.equal(layer.values, rounded(values, bits, False))
    if window is None:
        assert layer.get_seq_length() == 5
    more = torch.randn(1, 2, 2, 12).bfloat16(), torch.randn(1, 2, 2, 8).half()
    found = layer.update(*more)
    assert torch.equal(found[0], torch.cat([rounded(keys, bits, True), rounded(more[0], bits, True)], dim=2))
    assert found[1].dtype is torch.float16
    layer.keys = layer.values = None
    assert layer.keys is None
    assert layer.values is None


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_are_adopted_as_they_are(bits: int, window: int | None) -> None:
    states = [torch.randn(2, 2, 9, size).bfloat16() for size in (6, 10)]
    rows = [Codec(bits).encode(x, is_key=i == 0) for i, x in enumerate(states)]
    layer = make(window, 0, bits)
    layer.adopt(*rows, (6, 10), (torch.bfloat16, torch.bfloat16))
    assert layer.get_seq_length() == 9
    assert torch.equal(layer.buffers.used(layer.buffers.keys), rows[0])
    assert torch.equal(layer.values, rounded(states[1], bits, False))
    key, _ = layer.update(*(x[:, :, :1] for x in states))
    assert torch.equal(key[:, :, 9:], rounded(states[0][:, :, :1], bits, True))


@pytest.mark.parametrize("bits", [8, 4])
def test_memory_is_that_of_the_rows(bits: int) -> None:
    layer, buffers = make(None, 0, bits), []
    for _ in range(1000):
        layer.update(torch.ones(1, 2, 1, 64), torch.ones(1, 2, 1, 64))
        if not any(layer.buffers.keys is buffer for buffer in buffers):
            buffers.append(layer.buffers.keys)
    assert len(buffers) <= 10
    assert layer.buffers.keys.dtype is torch.uint8
    assert layer.buffers.keys.numel() <= 1.5 * 1000 * 2 * cached.row_bytes(bits, 64)
    assert Codec(bits).bytes_per_token(2, (64, 64), torch.bfloat16) == 4 * cached.row_bytes(bits, 64)
    assert AS_IS.bytes_per_token(2, (64, 32), torch.bfloat16) == 2 * 96 * 2
    assert make(None, 10**6, bits).buffers.room(3) == MINIMUM_TOKENS


@pytest.mark.parametrize("native_is_there", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_are_the_same_with_and_without_the_native_library(
    bits: int, native_is_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native_is_there:
        monkeypatch.setattr(native, "is_available", lambda: False)
    states = torch.randn(2, 3, 5, 32).transpose(0, 1)
    for given in (states, states.double(), states.repeat(1, 1, 1, 10), states.mT.contiguous().mT):
        for is_key in (True, False):
            found = Codec(bits).encode(given, is_key=is_key)
            assert torch.equal(found, cached.encode(given, bits, is_key=is_key))


@pytest.mark.parametrize("bits", [8, 4])
def test_what_does_not_fit_fails_and_changes_nothing(bits: int) -> None:
    layer = make(None, 0, bits)
    layer.update(torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8))
    before = layer.keys
    for shape in ((1, 2, 1, 8), (2, 3, 1, 8), (2, 2, 1, 10)):
        with pytest.raises(RuntimeError):
            layer.update(torch.randn(shape), torch.randn(shape))
    assert torch.equal(layer.keys, before)
    cpu = torch.device("cpu")
    assert layer.reserve(1, 1, 2, 8, torch.float32, cpu) is None
    assert layer.reserve(2, 1, 2, 8, torch.bfloat16, cpu) is None
    assert layer.reserve(2, 100, 2, 10, torch.float32, cpu) is None
    assert layer.reserve(2, 100, 2, 8, torch.float32, cpu) is not None
