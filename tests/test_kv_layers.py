"""A layer whose blocks move out is bit for bit the layer that keeps everything, whatever is done to both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers.cache_utils import DynamicLayer

from hf_accel.cache.codec import Codec
from hf_accel.cache.layers.growing import GrowingLayer
from hf_accel.cache.layers.tiered import TieredLayer
from hf_accel.cache.tiers.tiers import Tiers

HEADS, SIZE, VALUE_SIZE, BLOCK = 2, 6, 4, 4
CPU = torch.device("cpu")


def tiered(store: str = "disk", near: int = 20_000, bits: int | None = None, index: int = 0) -> TieredLayer:
    tiers = Tiers(CPU, store=store, near_budget_bytes=near)  # type: ignore[arg-type]
    return TieredLayer(index, tiers, BLOCK, Codec(bits))


class Twins(RuleBasedStateMachine):
    """Stock's layer (for lengths and masks), the one that keeps everything, and one whose blocks move."""

    bits: int | None = None

    @initialize(batch=st.integers(1, 3), store=st.sampled_from(["cpu", "disk"]), near=st.sampled_from([6_000, 60_000]))
    def start(self, batch: int, store: str, near: int) -> None:
        self.batch, self.seed = batch, 0
        self.stock, self.whole = DynamicLayer(), GrowingLayer(0, Codec(self.bits))
        self.ours = tiered(store, near, self.bits)
        self.layers: list[Any] = [self.stock, self.whole, self.ours]

    def states(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        keys = torch.randn(self.batch, HEADS, tokens, SIZE, generator=generator)
        return keys, torch.randn(self.batch, HEADS, tokens, VALUE_SIZE, generator=generator)

    @property
    def length(self) -> int:
        return int(self.stock.get_seq_length())

    @rule(tokens=st.sampled_from([1, 1, 1, 2, 3, 4, 7, 8, 9, 21]))
    def update(self, tokens: int) -> None:
        if self.length > 80:
            return
        keys, values = self.states(tokens)
        found = [layer.update(keys.clone(), values.clone()) for layer in self.layers]
        for part in (0, 1):
            assert found[2][part].shape == found[0][part].shape
            assert torch.equal(found[2][part] + 0, found[1][part] + 0)

    @rule(tokens=st.integers(0, 4))
    def crop(self, tokens: int) -> None:
        self.shorten(tokens)

    @rule(blocks=st.integers(1, 4), tokens=st.integers(-2, 2))
    def crop_across_blocks(self, blocks: int, tokens: int) -> None:
        self.shorten(blocks * BLOCK + tokens)

    def shorten(self, tokens: int) -> None:
        if tokens < self.length:  # else stock's layer wraps round
            for layer in self.layers:
                layer.crop(-tokens)

    @rule()
    def crop_everything(self) -> None:
        if self.length:
            self.stock.reset()
            self.whole.crop(-self.whole.get_seq_length())
            self.ours.crop(-self.ours.get_seq_length() - 3)

    @rule(tokens=st.integers(1, 3))
    def crop_to_a_positive_length_is_refused(self, tokens: int) -> None:
        for layer in self.layers:
            with pytest.raises(ValueError, match="positive"):
                layer.crop(tokens)

    @rule(rows=st.lists(st.integers(0, 5), min_size=1, max_size=4), boolean=st.booleans())
    def select(self, rows: list[int], boolean: bool) -> None:
        indices = torch.tensor(rows) % self.batch
        if boolean:
            indices = torch.isin(torch.arange(self.batch), indices)
        if self.length:
            for layer in self.layers:
                layer.batch_select_indices(indices)
            self.batch = int(indices.sum()) if boolean else len(indices)

    @precondition(lambda self: self.batch < 3)
    @rule(repeats=st.integers(1, 2))
    def repeat(self, repeats: int) -> None:
        if self.length:
            for layer in self.layers:
                layer.batch_repeat_interleave(repeats)
            self.batch *= repeats

    @rule(seed=st.integers(0, 1000))
    def reorder(self, seed: int) -> None:
        if self.length:
            rows = torch.randint(0, self.batch, (self.batch,), generator=torch.Generator().manual_seed(seed))
            for layer in self.layers:
                layer.reorder_cache(rows)

    @rule()
    def reset(self) -> None:
        for layer in self.layers:
            layer.reset()

    @invariant()
    def are_equal(self) -> None:
        if not hasattr(self, "ours"):
            return
        assert self.ours.get_seq_length() == self.whole.get_seq_length() == self.length
        assert self.ours.get_mask_sizes(3) == self.stock.get_mask_sizes(3)
        assert self.ours.buffers.stop <= 2 * BLOCK
        if self.length:
            assert torch.equal(self.ours.keys, self.whole.keys)
            assert torch.equal(self.ours.values, self.whole.values)
            if self.bits is None:
                assert torch.equal(self.ours.keys, self.stock.keys)


class TwinsOfEight(Twins):
    bits = 8


class TwinsOfFour(Twins):
    bits = 4


TestAsTheyAre = Twins.TestCase
TestEight = TwinsOfEight.TestCase
TestFour = TwinsOfFour.TestCase
TestAsTheyAre.settings = settings(max_examples=100, stateful_step_count=40)
TestEight.settings = TestFour.settings = settings(max_examples=50, stateful_step_count=40)


def filled(layer: Any, tokens: int, seed: int = 0, step: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(1, HEADS, tokens, SIZE, generator=generator)
    for at in range(0, tokens, step):
        layer.update(states[:, :, at : at + step], states[:, :, at : at + step])
    return states


def test_a_prompt_at_once_lies_as_token_by_token() -> None:
    one, other = tiered(), tiered()
    states = filled(one, 30)
    other.update(states, states)
    assert torch.equal(one.keys, states)
    assert torch.equal(other.keys, states)
    # at least a block can be taken back without touching the tiers
    assert one._away == other._away == 24 - (0 if one.buffers.stop <= 2 * BLOCK else BLOCK)
    assert BLOCK <= one.buffers.stop <= 2 * BLOCK


def test_steps_of_which_one_block_is_taken_back_touch_no_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = tiered()
    filled(layer, 30)
    monkeypatch.setattr(layer.tiers, "pop", None)
    layer.crop(-BLOCK)
    assert layer.get_seq_length() == 26


def test_rows_are_chosen_where_nothing_is_hot() -> None:
    layer = tiered()
    states = torch.randn(2, HEADS, 9, SIZE)
    layer.update(states, states)
    layer.crop(-5)
    assert layer.buffers.stop == 0
    layer.batch_select_indices(torch.tensor([1, 1, 0]))
    assert torch.equal(layer.keys, states[[1, 1, 0], :, :4])  # type: ignore[arg-type]
    more = torch.randn(3, HEADS, 7, SIZE)
    layer.update(more, more)
    assert torch.equal(layer.keys[:, :, 4:], more)  # type: ignore[index]


def test_layers_share_tiers_and_do_not_disturb_each_other() -> None:
    tiers = Tiers(CPU, store="disk", near_budget_bytes=3000)
    layers = [TieredLayer(index, tiers, BLOCK) for index in range(3)]
    states = [filled(layer, 20 + index, index) for index, layer in enumerate(layers)]
    layers[1].crop(-15)
    layers[2].reset()
    assert torch.equal(layers[0].keys, states[0])  # type: ignore[arg-type]
    assert torch.equal(layers[1].keys, states[1][:, :, :6])  # type: ignore[arg-type]
    assert layers[2].get_seq_length() == tiers.count(2) == 0


@pytest.mark.parametrize("near", [2_000, 100_000])
def test_inference_tensors_are_gone_on_with(near: int) -> None:
    for outside, inside in ((5, 9), (8, 8), (1, 1)):
        layer = tiered(near=near)
        with torch.inference_mode():
            filled(layer, 2 * BLOCK + inside - 1)
        before = layer.keys.clone()  # type: ignore[union-attr]
        filled(layer, outside)
        layer.crop(-outside)
        assert torch.equal(layer.keys, before)  # type: ignore[arg-type]
    with torch.inference_mode():
        layer = tiered(near=near)
        filled(layer, 20)
    layer.crop(-13)
    layer.batch_repeat_interleave(2)
    assert layer.keys.shape == (2, HEADS, 7, SIZE)  # type: ignore[union-attr]


def test_gradients_end_at_the_layer() -> None:
    layer = tiered()
    keys = torch.randn(1, HEADS, 20, SIZE, requires_grad=True)
    layer.update(keys, keys)
    layer.update(keys * 2, keys)
    assert not layer.keys.requires_grad  # type: ignore[union-attr]
    assert not layer.buffers.keys.requires_grad  # type: ignore[union-attr]
    assert torch.equal(layer.keys, torch.cat([keys, keys * 2], dim=2))  # type: ignore[arg-type]


def test_what_does_not_fit_fails_as_in_stock_and_changes_nothing() -> None:
    layer = tiered()
    states = filled(layer, 20)
    for other in (
        torch.randn(2, HEADS, 1, SIZE),
        torch.randn(1, HEADS + 1, 1, SIZE),
        torch.randn(1, HEADS, 1, SIZE + 1),
    ):
        with pytest.raises(RuntimeError):
            layer.update(other, other)
    half = tiered()
    half.update(states.bfloat16(), states.bfloat16())
    with pytest.raises(TypeError, match="bfloat16"):  # stock's would become fp32 as a whole
        half.update(states, states)
    for name in ("keys", "values"):
        with pytest.raises(TypeError, match="update"):
            setattr(layer, name, states)
    assert torch.equal(layer.keys, states)  # type: ignore[arg-type]
    assert torch.equal(half.keys, states.bfloat16())  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [None, 8])
def test_kernels_may_write_while_nothing_is_away(bits: int | None) -> None:
    layer = tiered(bits=bits)
    given = (1, 3, HEADS, SIZE, torch.float32, CPU)
    filled(layer, 5)
    assert layer.reserve(*given) is not None
    assert layer.reserve(1, 4, *given[2:]) is None  # that is more than there is room for
    filled(layer, 4)
    assert layer._away
    assert layer.reserve(*given) is None
