"""Layers that no library has are described, audited and run natively; what cannot be, or changes, is left."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import novel
import pytest
import torch
from models import build, padded, prompt
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import hf_accel
from hf_accel import DecoderBlockConfig, DecodingConfig, KVCacheConfig
from hf_accel.core.model.anatomy import Anatomy
from hf_accel.core.model.discovery import discovering
from hf_accel.core.model.discovery.bounds import within_bounds
from hf_accel.core.model.discovery.forms import BlockForm
from hf_accel.kernels import native
from hf_accel.layers.block import NativeLayer

NEW = 8


def texts(model: Any) -> list[Tensor]:
    """Return greedy text, greedy text of padded prompts, and sampled text."""
    torch.manual_seed(0)
    greedy = model.generate(prompt(), max_new_tokens=NEW, do_sample=False)
    rows = model.generate(**padded([3, 9]), max_new_tokens=NEW, do_sample=False)
    return [greedy, rows, model.generate(prompt(2), max_new_tokens=NEW, do_sample=True, top_k=20)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def optimised(model: Any) -> Any:
    return hf_accel.optimize(model, [DecoderBlockConfig(), KVCacheConfig(), DecodingConfig()])


def reasons(model: Any) -> str:
    return "; ".join(skip.reason for skip in hf_accel.report(model).skipped if skip.what == "DecoderBlockConfig")


@contextmanager
def counted() -> Iterator[list[Any]]:
    """Count the layers that ran natively, each by its kernel, in a step of the whole model too."""
    calls: list[Any] = []
    call, step = native.NativeBlock.__call__, native.NativeStep.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native.NativeStep, "__call__", lambda self, *a: (calls.extend(self.blocks), step(self, *a))[1])
        patch.setattr(native.NativeBlock, "__call__", lambda self, *a: (calls.append(self), call(self, *a))[1])
        yield calls


def form_of(model: Any) -> BlockForm:
    anatomy = Anatomy.of(model)
    assert anatomy.blocks, anatomy.blocks_missing
    return anatomy.blocks[0].form


SANDWICH = {"input": "one", "attention_out": "three", "mlp": "two", "mlp_out": "four"}
ORDERS: dict[Any, tuple[dict[str, str], bool, float, float]] = {
    novel.sequential: ({"input": "one", "mlp": "two"}, False, 1.0, 1.0),
    novel.sandwich: (SANDWICH, False, 1.0, 1.0),
    novel.post_norm: ({"attention_out": "three", "mlp_out": "four"}, False, 1.0, 1.0),
    novel.parallel: ({"input": "one"}, True, 1.0, 1.0),
    novel.parallel_with_two_norms: ({"input": "one", "mlp": "two"}, True, 1.0, 1.0),
    novel.scaled: ({"input": "one", "mlp": "two"}, False, 0.5, 1.0),
    novel.scaled_at_its_end: ({"input": "one", "mlp": "two"}, False, 1.0, 0.5),
}


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)
def test_structures(order: Any) -> None:
    norms, is_parallel, scale, out_scale = ORDERS[order]
    form = form_of(novel.novel(order))
    assert {name: norm.path for name, norm in form.norms.items()} == norms
    assert (form.is_parallel, form.residual_scale, form.out_scale) == (is_parallel, scale, out_scale)
    assert (form.heads, form.kv_heads, form.head_dim) == (novel.HEADS, novel.GROUPS, novel.SIZE)
    assert (form.projections, form.o, form.down) == (("mix.asked", "mix.held"), "mix.told", "feed.thin")
    assert (form.rotary, form.activation, form.scale) == ("pairs_of_halves", "gelu_tanh", 0.4)
    assert form.gate is not None
    assert form.up is not None
    assert (form.up.start, form.gate.start) == (0, form.up.stop), "the second half is the gate"


@pytest.mark.native
@pytest.mark.parametrize("order", [novel.sandwich, novel.parallel_with_two_norms, novel.scaled_at_its_end])
def test_a_made_up_architecture_runs_natively(order: Any) -> None:
    model = novel.novel(order)
    expected = texts(model)
    optimised(model)
    with counted() as calls:
        assert same(texts(model), expected)
    assert len(calls) >= 3 * 3 * (NEW - 1), "all layers, in all steps of three calls"
    hf_accel.restore(model)
    assert same(texts(model), expected)


@pytest.mark.native
def test_a_feed_forward_part_that_no_kernel_knows_runs_as_it_is() -> None:
    model = novel.novel(feed=novel.OddFeed)
    assert form_of(model).feed_forward == "feed"
    expected = texts(model)
    optimised(model)
    with counted() as calls:
        assert same(texts(model), expected)
    assert len(calls) >= 3 * 3 * (NEW - 1)


def not_causal(config: Any, index: int) -> novel.Mixer:
    made = novel.Mixer(config, index)
    made.is_causal = False
    return made


def with_zeros_aside() -> Any:
    """Return a model of which a part does nothing yet, as before it is trained or its weights are loaded."""
    model = novel.novel(novel.with_something_aside)
    for layer in model.model.layers:
        nn.init.zeros_(layer.aside.weight)
    return model


def with_ones_in_front() -> Any:
    model = novel.novel(novel.with_a_weight_of_its_own)
    for layer in model.model.layers:
        layer.lift = nn.Parameter(torch.ones(()))
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "clamped": (lambda: novel.novel(novel.clamped), "it clamps values"),
    "a norm of the sum": (lambda: novel.novel(novel.normed_sum), "nothing known explains"),
    "a hidden number": (lambda: novel.novel(novel.scaled_by_a_number_in_the_code), "nothing known explains"),
    "queries by position": (lambda: novel.novel(mixer=novel.MixerByPosition), "something else from position 1024 on"),
    "zeros aside": (with_zeros_aside, "aside.weight is a weight of which nothing is known"),
    "ones in front": (with_ones_in_front, "lift is a weight of which nothing is known"),
    "a window of its own": (lambda: novel.novel(mixer=novel.MixerWithAWindow), "not given the mask that the layer"),
    "not causal": (lambda: novel.novel(mixer=not_causal), "its attention is not causal"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_left(name: str) -> None:
    make, reason = REFUSED[name]
    model = make()
    expected = texts(model)
    with pytest.raises(hf_accel.UnsupportedModelError, match=reason):
        optimised(model)
    assert same(texts(model), expected)


def attribute(model: Any) -> None:
    model.model.layers[1].mix.strength = 0.9


def module(model: Any) -> None:
    before = model.model.layers[1].feed.thin
    model.model.layers[1].feed.thin = nn.Linear(before.in_features, before.out_features, bias=False)
    model.model.layers[1].feed.thin.weight = nn.Parameter(before.weight.detach().flip(0))


def weight(model: Any) -> None:
    model.model.layers[1].feed.thin.weight = nn.Parameter(model.model.layers[1].feed.thin.weight.detach().flip(0))


def values(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].one.gain.mul_(1.5)


def hook(model: Any) -> None:
    model.model.layers[1].mix.register_forward_hook(lambda module, args, output: output * 1.5)


def order(model: Any) -> None:
    model.model.layers[1].order = novel.sandwich


# which layers go on natively: none where a value decides, others than the changed one, all where weights are followed
CHANGES = {attribute: 0, module: 2, weight: 3, values: 3, hook: 2, order: 0}


@pytest.mark.native
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_layers_that_change_between_calls(change: Callable[[Any], None]) -> None:
    model = novel.novel(novel.sequential)
    stock = copy.deepcopy(model)
    optimised(model)
    before = texts(model)
    change(stock)
    change(model)
    expected = texts(stock)
    assert not same(before, expected), "the change shows in the text"
    assert same(texts(model), expected)
    with counted() as calls:
        assert same(texts(model), expected)
    assert len(set(calls)) == CHANGES[change]


@pytest.mark.native
def test_a_layer_that_fails_its_audit_is_left_while_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = novel.novel()
    expected, describe = texts(model), discovering.described_layer

    def wrong(record: Any, dtype: Any) -> BlockForm:
        form = describe(record, dtype)
        return replace(form, scale=0.6) if form.index == 1 else form

    monkeypatch.setattr(discovering, "described_layer", wrong)
    optimised(model)
    assert "layer 1 runs as it is: Layer 1 (Layer) differs from its own forward by" in reasons(model)
    assert [isinstance(layer, NativeLayer) for layer in model.model.layers] == [True, False, True]
    assert same(texts(model), expected)


def test_copies_take_over_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    anatomy = Anatomy.of(novel.novel())
    assert len(anatomy.blocks) == 3
    monkeypatch.setattr(discovering, "listen", lambda *given: pytest.fail("it is asked again"))
    again = Anatomy.of(copy.deepcopy(anatomy.model), anatomy.known)
    assert [block.form for block in again.blocks] == [block.form for block in anatomy.blocks]


def test_describing_leaves_the_model_alone() -> None:
    model = novel.novel()
    fired: list[int] = []
    handle = model.model.layers[0].mix.register_forward_hook(lambda *_: fired.append(1))
    before = {name: vars(module).copy() for name, module in model.named_modules()}
    assert Anatomy.of(model).blocks
    assert not fired
    assert {name: vars(module).copy() for name, module in model.named_modules()} == before
    handle.remove()


def test_configs_may_hold_anything() -> None:
    config = {"patches": {1: 4}, "text": {"max_position_embeddings": 9, "seq_length": 5, "n_ctx": None}, "hidden": 7}
    assert sorted(discovering._lengths(config)) == [5, 9]


TABLE, BEYOND = torch.randn(6, 4), torch.tensor([[0, 5], [6, 1]])


@pytest.mark.parametrize(
    "read",
    [
        lambda ids: torch.nn.functional.embedding(ids, TABLE),
        lambda ids: TABLE[ids],
        lambda ids: TABLE[:, None][ids, 0],
        lambda ids: TABLE.index_select(0, ids.flatten()),
        lambda ids: torch.gather(TABLE, 0, ids.reshape(-1, 4)),
        lambda ids: torch.take(TABLE[:, 0].contiguous(), ids),
    ],
    ids=["embedding", "brackets", "two dimensions", "index_select", "gather", "take"],
)
def test_reads_beyond_a_table_are_errors_before_they_are_made(read: Callable[[Any], Any]) -> None:
    """On a GPU such a read stops the device for the whole process; the error names the index."""
    with within_bounds():
        read(BEYOND.clamp(max=5))
        with pytest.raises(IndexError, match=r"^index 6 of 6$"):
            read(BEYOND)
    assert torch.equal(TABLE[torch.arange(6) < 3], TABLE[:3])


class Embeddings(TorchDispatchMode):
    """Notes of every look into a table whether it was beyond its end."""

    def __init__(self) -> None:
        super().__init__()
        self.are_beyond: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.embedding:
            self.are_beyond.append(int(args[1].max()) >= len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_positions_that_a_model_has_not_are_never_read(name: str) -> None:
    """Learned positions end with their table; layers are described far from the beginning all the same."""
    model = build(name)
    with Embeddings() as seen:
        assert Anatomy.of(model).blocks
    assert seen.are_beyond
    assert not any(seen.are_beyond)
