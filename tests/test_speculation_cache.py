"""What rows of different lengths stand on: cache layers, forward passes, tokens, and draws by token."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from catalogue import exact
from models import build, padded
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import hf_accel
from hf_accel import DecodingConfig, KVCacheConfig
from hf_accel.cache.layers.growing import GrowingLayer
from hf_accel.cache.layers.sliding import GrowingSlidingLayer
from hf_accel.cache.patcher import use_growing_layers
from hf_accel.core.calls.cache_layers import RaggedLayer
from hf_accel.core.calls.forward import Stepper
from hf_accel.core.calls.rollback import rollback_obstacle, stop_recording
from hf_accel.core.calls.rows import Rows
from hf_accel.core.drift import CACHE
from hf_accel.decoding import draws as draws_module
from hf_accel.decoding.draws import Draws

HEADS, SIZE = 2, 4
ALL = 10**6


@pytest.fixture
def unwritten_is_nan() -> Iterator[None]:
    """Let memory that nobody has written hold NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.zeros(2).new_empty((2, 3)).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


class Apart:
    """Our layer with a batch of rows, and stock layers with one row each, which take the same steps."""

    def __init__(self, batch: int, window: int | None, expected: int, seed: int) -> None:
        self.dice, self.window = random.Random(seed), window
        self.ours: Any
        self.rows: list[Any]
        if window is None:
            self.ours, self.rows = GrowingLayer(expected), [DynamicLayer() for _ in range(batch)]
        else:
            self.ours = GrowingSlidingLayer(window, expected)
            self.rows = [DynamicSlidingWindowLayer(window) for _ in range(batch)]
            for layer in (self.ours, *self.rows):
                layer.activate_past_recording()
        self.lengths = [0] * batch
        self.ended: set[int] = set()
        self.generator = torch.Generator().manual_seed(seed)

    def live(self) -> list[tuple[int, Any]]:
        return [(row, layer) for row, layer in enumerate(self.rows) if row not in self.ended]

    def states(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        made = torch.randn(2, len(self.rows), HEADS, tokens, SIZE, generator=self.generator)
        return made[0], made[1]

    def begin(self, tokens: int) -> None:
        """The prompt, in one step, all rows alike."""
        keys, values = self.states(tokens)
        self.ours.update(keys, values)
        for row, layer in enumerate(self.rows):
            layer.update(keys[row : row + 1], values[row : row + 1])
        self.lengths = [tokens] * len(self.rows)
        self.keep(self.lengths)

    def step(self, tokens: int, by_kernel: bool) -> None:
        """Append `tokens` tokens to every row, and compare what the first and the last of them can see."""
        keys, values = self.states(tokens)
        first, stop = self.ours.columns(tokens)
        if by_kernel:
            pasts, found, offset = self._by_kernel(keys, values)
        else:
            found = self.ours.update(keys.clone(), values.clone())
            assert found[0].shape[2] == stop - first
            pasts, offset = self.lengths, first
        for ours in found:
            assert ours.isfinite().all(), "hidden, but multiplied by zero"
        for row, layer in self.live():
            expected = layer.update(keys[row : row + 1], values[row : row + 1])
            seen = min(self.lengths[row], (self.window or ALL) - 1)
            begin = pasts[row] - seen - offset
            assert begin >= 0, "the row does not see far enough back"
            assert self.lengths[row] + tokens <= stop
            for ours, stock in zip(found, expected, strict=True):
                assert torch.equal(ours[row, :, begin : begin + seen + tokens], stock[0])
        self.lengths = [length + tokens for length in self.lengths]
        assert self.ours.get_seq_length() == max(self.lengths)

    def _by_kernel(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[list[int], Any, int]:
        """Write into the reserved buffers; returns where rows go on in them, both, and where the views begin."""
        tokens = keys.shape[2]
        reserved = self.ours.reserve(len(self.rows), tokens, HEADS, SIZE, keys.dtype, keys.device)
        assert reserved is not None
        key_buffer, value_buffer, past, first, rows, own = reserved
        assert own is None
        pasts = [past] * len(self.rows) if rows is None else rows.tolist()
        assert max(pasts) == past
        assert rows is None or (rows.dtype == torch.int64 and rows.device.type == "cpu")
        assert key_buffer.shape[2] >= past + tokens
        for row, start in enumerate(pasts):
            key_buffer[row, :, start : start + tokens] = keys[row]
            value_buffer[row, :, start : start + tokens] = values[row]
        self.ours.commit(tokens)
        view = slice(first, past + tokens)
        return pasts, (key_buffer[:, :, view], value_buffer[:, :, view]), first

    def keep(self, lengths: list[int]) -> None:
        self.ours.set_rows(lengths)
        for row, layer in self.live():
            layer.crop(lengths[row] - self.lengths[row])
        self.lengths = list(lengths)
        assert self.ours.get_seq_length() == max(lengths)

    def walk(self, steps: int, kernels: float) -> None:
        for _ in range(steps):
            before = self.lengths
            if self.dice.random() < 0.3:  # a draft over the model's own cache: token by token, then taken back
                for _ in range(self.dice.randrange(1, 6)):
                    self.step(1, self.dice.random() < kernels)
                self.keep(before)
            tokens = self.dice.choice([1, 1, 2, 5])
            self.step(tokens, self.dice.random() < kernels)
            self.keep([length + self.dice.randrange(tokens + 1) for length in before])


@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("kernels", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("expected", [0, 30, 400])
@pytest.mark.parametrize("window", [None, 2, 5, 40])
def test_every_row_sees_what_it_would_see_alone(window: int | None, expected: int, kernels: float) -> None:
    for seed in range(3):
        layers = Apart(1 + seed, window, expected, seed)
        layers.begin(1 + 7 * seed)
        layers.walk(40, kernels)


@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("window", [None, 5])
def test_rows_that_have_ended_may_be_put_anywhere(window: int | None) -> None:
    """Nobody sees what they hold then, only that it is numbers; the others are not disturbed."""
    layers = Apart(4, window, 0, 1)
    layers.begin(9)
    layers.walk(5, 0.5)
    for step in range(60):
        layers.ended = {0} if step < 20 else {0, 2}
        before = layers.lengths
        layers.step(3, step % 3 == 0)
        lengths = [length + layers.dice.randrange(1, 4) for length in before]
        least = min(lengths[row] for row, _ in layers.live())
        layers.keep([least if row in layers.ended else length for row, length in enumerate(lengths)])


@pytest.mark.parametrize("window", [None, 6])
def test_rows_in_step_again_are_a_plain_layer(window: int | None) -> None:
    layers = Apart(2, window, 0, 2)
    layers.begin(9)
    layers.step(4, False)
    layers.keep([10, 13])
    layers.ours.crop(0)
    assert layers.ours.buffers.rows is None
    assert layers.ours.get_seq_length() == 13


def test_who_can_have_rows_apart() -> None:
    assert isinstance(GrowingLayer(), RaggedLayer)
    assert isinstance(GrowingSlidingLayer(8), RaggedLayer)
    assert not isinstance(DynamicLayer(), RaggedLayer)
    stock, ours = (DynamicCache(config=build("gemma3").config) for _ in range(2))
    use_growing_layers(ours, 32)
    assert rollback_obstacle(stock, is_batch=False) is None
    assert "different lengths" in str(rollback_obstacle(stock, is_batch=True))
    assert rollback_obstacle(ours, is_batch=True) is None
    assert "no cache" in str(rollback_obstacle(((),), is_batch=False))


@pytest.mark.parametrize("growing", [False, True])
def test_windows_forget_again_once_recording_stops(growing: bool) -> None:
    cache: Any = DynamicCache(config=build("mistral").config)
    if growing:
        use_growing_layers(cache, 64)
    cache.activate_past_recording()
    keys = torch.randn(1, 2, 20, 16)
    for layer in cache.layers:
        layer.update(keys, keys)
    stop_recording(cache.layers)
    for layer in cache.layers:
        assert layer.record_past is False
        assert torch.equal(layer.keys, keys[:, :, -7:])
        assert layer.get_seq_length() == 20


def prefilled(model: Any, inputs: dict[str, torch.Tensor]) -> Stepper:
    """Return a stepper over a cache that holds the prompt."""
    cache: Any = DynamicCache(config=model.config)
    use_growing_layers(cache, 64)
    cache.activate_past_recording()
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    model(**inputs, position_ids=positions, use_cache=True, **{CACHE: cache})
    batch, tokens = mask.shape
    stepper = Stepper(model, cache, [tokens] * batch, mask, positions[:, -1] + 1, tokens)
    stepper.keep(stepper.lengths)
    return stepper


def alone(model: Any, ids: torch.Tensor, last: int) -> torch.Tensor:
    """Return the logits [last, V] of the last tokens of one text without padding."""
    return model(ids[None]).logits[0, -last:]  # type: ignore[no-any-return]


@torch.no_grad()
@pytest.mark.parametrize("patched", [True, False], ids=["optimised", "stock"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt2", "opt", "mixtral", "deepseek_v3"])
def test_a_step_gives_every_row_what_it_gets_alone(name: str, patched: bool) -> None:
    reference, model = build(name), build(name)
    if patched:
        hf_accel.optimize(model, exact(model))
    dice, generator = random.Random(7), torch.Generator().manual_seed(7)
    inputs = padded([9, 3, 6])
    stepper = prefilled(model, inputs)
    texts = [ids[kept.bool()] for ids, kept in zip(*inputs.values(), strict=True)]
    for _ in range(7):
        tokens = dice.choice([1, 2, 4])
        fed = torch.randint(8, 128, (3, tokens), generator=generator)
        before = stepper.lengths
        logits = stepper.forward(fed)
        for row, text in enumerate(texts):
            expected = alone(reference, torch.cat([text, fed[row]]), tokens)
            assert (logits[row] - expected).abs().max() <= 2e-3 * (1 + expected.abs().max())
        taken = [dice.randrange(tokens + 1) for _ in texts]
        stepper.keep([length + count for length, count in zip(before, taken, strict=True)])
        texts = [torch.cat([text, fed[row, : taken[row]]]) for row, text in enumerate(texts)]
    assert stepper.is_ragged


@torch.no_grad()
def test_a_stepper_beside_another_leaves_it_as_it_was() -> None:
    """As a draft over the model's own cache: it writes behind the rows and takes that back."""
    model = build("gemma3")
    stepper, twin = (prefilled(model, padded([9, 3])) for _ in range(2))
    fed = torch.tensor([[20, 21, 22], [30, 31, 32]])
    for one in (stepper, twin):
        one.forward(fed)
        one.keep([10, 12])
    drafts = stepper.beside(model)
    for _ in range(5):
        drafts.forward(fed[:, :1])
    assert stepper.lengths == [10, 12]
    drafts.keep([10, 12])
    assert torch.equal(stepper.forward(fed), twin.forward(fed))


def test_rows_grow_apart() -> None:
    inputs = padded([3, 1])
    rows = Rows(inputs["input_ids"], inputs["attention_mask"], 5)
    prompts = [inputs["input_ids"][0].tolist(), inputs["input_ids"][1, 2:].tolist()]
    assert len(rows) == 2
    assert rows.texts == prompts
    rows.add(0, [50])
    rows.add(1, [])
    rows.add(1, [60, 61, 62, 63])  # beyond what was expected
    assert rows.lengths == [4, 7]
    assert [rows.new_tokens(row) for row in (0, 1)] == [1, 4]
    assert rows.last().tolist() == [[50], [63]]
    assert rows.texts == [[*prompts[0], 50], [*prompts[1], 60, 61, 62, 63]]
    rows.ended[0] = True
    assert rows.live() == [1]
    assert rows.ids[1, 3:7].tolist() == [60, 61, 62, 63]


@pytest.mark.parametrize("kept", [0, 64 * 2**20])
def test_draws_are_those_of_plain_sampling_in_any_order(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where memory holds only the latest: then a block is drawn again."""
    monkeypatch.setattr(draws_module, "BLOCK_BYTES", kept)
    torch.manual_seed(4)
    expected, states = [], [torch.get_rng_state()]
    for _ in range(30):
        expected.append(torch.empty(2, 11).exponential_(1))
        states.append(torch.get_rng_state())
    dice = random.Random(1)
    torch.manual_seed(4)
    draws = Draws(2, 11, torch.device("cpu"))
    for _ in range(150):
        index = dice.randrange(30)
        assert torch.equal(draws.block(index), expected[index])
    starts = [3, 17]
    found = draws.rows(starts, 5)
    for row, start in enumerate(starts):
        assert torch.equal(found[row], torch.stack([expected[start + t][row] for t in range(5)]))
    for count in (7, 30, 0):
        draws.finish(count)
        assert torch.equal(torch.get_rng_state(), states[count])


def test_draws_that_begin_later() -> None:
    torch.manual_seed(4)
    expected = [torch.empty(1, 5).exponential_(1) for _ in range(6)]
    torch.manual_seed(4)
    draws = Draws(1, 5, torch.device("cpu"), first=10)
    assert torch.equal(draws.rows([12], 3)[0], torch.cat(expected[2:5]))
    assert torch.equal(draws.rows([10], 1)[0], expected[0])
    draws.finish(15)
    assert torch.equal(torch.empty(1, 5).exponential_(1), expected[5])


def test_a_chosen_token_is_multinomials() -> None:
    torch.manual_seed(5)
    probabilities = torch.randn(200, 3, 50).softmax(-1)
    draws = Draws(3, 50, torch.device("cpu"))
    state = torch.get_rng_state()
    found = [(probabilities[t] / draws.rows([t] * 3, 1)[:, 0]).argmax(-1) for t in range(200)]
    torch.set_rng_state(state)
    assert torch.equal(torch.stack(found), torch.stack([torch.multinomial(p, 1)[:, 0] for p in probabilities]))


def test_recording_is_off_where_nobody_speculates() -> None:
    model = hf_accel.optimize(build("mistral"), [DecodingConfig(), KVCacheConfig()])
    out = model.generate(**padded([9]), max_new_tokens=12, return_dict_in_generate=True)
    assert all(layer.record_past is False and layer.keys.shape[2] == 7 for layer in out[CACHE].layers)
