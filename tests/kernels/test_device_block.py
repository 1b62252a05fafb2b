"""Decoder layers over static caches, by kernels for GPUs or their twins, against the layers' own forwards."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import NAMES, build, prompt
from transformers import DynamicCache

import hf_accel
from hf_accel import DeviceBlockConfig
from hf_accel.core.drift import CACHE
from hf_accel.core.model.anatomy import Anatomy
from hf_accel.core.model.modes import evaluating
from hf_accel.core.model.watching import Surroundings
from hf_accel.errors import HfAccelError, VerificationError
from hf_accel.kernels import device, triton
from hf_accel.kernels.native.block_weights import Heads, Norm, Projection
from hf_accel.layers.audit import TOKENS, record
from hf_accel.layers.device_block import DeviceLayer, ProbeCache, device_step
from hf_accel.layers.guard import BlockStep
from hf_accel.ops import cached

# layers of the parts that Llama and Gemma have
DESCRIBED = [
    name for name in NAMES if any(b.form.norms["input"].kind.startswith("rms") for b in Anatomy.of(build(name)).blocks)
]
CAPACITY = 24
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where kernels in Triton run


def differences(name: str, kernels: device.Kernels, layers: int, at: torch.device | str = "cpu") -> list[float]:
    """Return how far the first layers of a model are from their own forwards over a prompt with padding."""
    model = build(name).to(at)
    anatomy = Anatomy.of(model)
    surroundings = Surroundings(m for block in anatomy.blocks for m in (block.layer, *block.modules))
    make = partial(device.DeviceBlock, kernels=kernels)
    with evaluating(model), torch.no_grad():
        records = record(anatomy)
        found = []
        for block in anatomy.blocks[:layers]:
            step = partial(device_step, BlockStep(block, 16, surroundings, make), is_audit=True)
            found.append(records[block.index].difference(step, ProbeCache(block, TOKENS)))
    return found


@pytest.mark.parametrize("name", DESCRIBED)
def test_layers_of_operations_in_torch_are_the_models_own(name: str) -> None:
    assert max(differences(name, device.TWINS, layers=9)) < 1e-6


@pytest.mark.triton
@pytest.mark.parametrize("name", ["qwen3", "mixtral"])
def test_layers_of_kernels_are_the_models_own(name: str) -> None:
    assert max(differences(name, device.of_triton(), layers=1, at=DEVICE)) < 1e-5


class StaticLayer:
    """See `hf_accel.core.calls.cache_layers.StaticLayer`."""

    def __init__(self, block: Any, rows: int, bits: int | None, lengths: torch.Tensor, window: int | None) -> None:
        row = block.head_dim if bits is None else cached.row_bytes(bits, block.head_dim)
        kind = torch.float32 if bits is None else torch.uint8
        self.keys, self.values = (torch.zeros(rows, block.kv_heads, CAPACITY, row, dtype=kind) for _ in "kv")
        self.bits, self.sliding_window, self.lengths = bits, window, lengths
        self.starts = torch.zeros_like(lengths)


class RoundingCache(DynamicCache):
    """A cache that grows, of what codes stand for."""

    def __init__(self, bits: int | None) -> None:
        super().__init__()
        self.bits = bits

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kept = [key_states, value_states]
        if self.bits is not None:
            kept = [cached.decode(cached.encode(states, self.bits, is_key=is_key), self.bits, states.shape[-1],
                                  states.dtype, is_key=is_key)
                    for states, is_key in zip(kept, (True, False))]  # fmt: skip
        return super().update(*kept, *args, **kwargs)


def static_cache(model: Any, rows: int = 1, bits: int | None = None) -> tuple[Any, torch.Tensor]:
    lengths = torch.zeros(rows, dtype=torch.int32)
    return SimpleNamespace(layers=[
        StaticLayer(block, rows, bits, lengths, getattr(block.attention, "sliding_window", None))
        for block in Anatomy.of(model).blocks
    ]), lengths  # fmt: skip


def optimised(name: str, monkeypatch: pytest.MonkeyPatch, max_rows: int = 16) -> Any:
    """Return a model optimised as on a GPU, with the kernels' twins on the CPU."""
    monkeypatch.setattr(triton, "obstacle", lambda device: None)
    monkeypatch.setattr(device, "of_triton", lambda: device.TWINS)
    model = build(name)
    hf_accel.optimize(model, [DeviceBlockConfig(max_rows=max_rows)])
    return model


def decoder_step(model: Any, hidden: torch.Tensor, at: int, cache: Any, mask: Any = None) -> torch.Tensor:
    """Return hidden states after all layers, as the decoder calls them."""
    decoder = model.get_decoder()
    places = torch.arange(at, at + hidden.shape[1])[None]
    with torch.no_grad():
        positions = decoder.rotary_emb(hidden, places)
        for layer in decoder.layers:
            hidden = layer(
                hidden, attention_mask=mask, position_ids=places, position_embeddings=positions, use_cache=True,
                **{CACHE: cache},
            )  # fmt: skip
    return hidden


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_steps_follow_one_another(bits: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tokens, then one by one: as the model's own layers over a cache that grows."""
    model, own = optimised("llama", monkeypatch), build("llama")
    assert all(isinstance(block.layer, DeviceLayer) for block in Anatomy.of(model).blocks)
    static, lengths = static_cache(model, bits=bits)
    growing = RoundingCache(bits)
    hidden = torch.randn(1, 7, own.config.hidden_size)
    at = 0
    for tokens in (4, 1, 1, 1):
        given = hidden[:, at : at + tokens]
        causal = torch.ones(tokens, at + tokens, dtype=torch.bool).tril(at)[None, None]
        expected = decoder_step(own, given, at, growing, causal)
        found = decoder_step(model, given, at, static)
        assert (found - expected).norm() <= 1e-5 * expected.norm()
        at += tokens
        lengths.add_(tokens)
    assert static.layers[0].keys[:, :, :at].any(-1).all()
    assert not static.layers[0].keys[:, :, at:].any()
    hf_accel.restore(model)
    assert not any(isinstance(block.layer, DeviceLayer) for block in Anatomy.of(model).blocks)


def test_all_else_goes_to_the_layers_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = optimised("llama", monkeypatch, max_rows=2)
    block = Anatomy.of(model).blocks[0]
    step = block.layer.step
    hidden = torch.randn(1, 1, model.config.hidden_size)
    positions = model.get_decoder().rotary_emb(hidden, torch.zeros(1, 1, dtype=torch.int64))

    def served(hidden: torch.Tensor = hidden, **changed: Any) -> bool:
        kwargs = {CACHE: static_cache(model, len(hidden))[0], "position_embeddings": positions, **changed}
        return block.form.call.fits(kwargs) and device_step(step, hidden, kwargs) is not None

    with torch.no_grad():
        assert served()
        assert not served(**{CACHE: DynamicCache()})
        assert not served(**{CACHE: None})
        assert not served(position_embeddings=None)
        assert not served(output_attentions=True)
        assert not served(hidden.double())
        assert not served(torch.randn(3, 1, model.config.hidden_size))
        other = static_cache(model, 2)[0]
        assert not served(**{CACHE: other})  # of another number of rows
        handle = block.attention.register_forward_hook(lambda *_: None)
        assert not served()
        handle.remove()
        assert served()
    assert not served()  # gradients are recorded
    ids = prompt()
    expected = build("llama").generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)


def test_packed_layers_serve_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "obstacle", lambda device: None)
    monkeypatch.setattr(device, "of_triton", lambda: device.TWINS)
    model = build("llama")
    hf_accel.optimize(model, [hf_accel.WeightOnlyConfig(bits=8), DeviceBlockConfig()])
    step = Anatomy.of(model).blocks[0].layer.step
    for rows, is_served in ((8, True), (9, False)):
        hidden = torch.randn(rows, 1, model.config.hidden_size)
        positions = model.get_decoder().rotary_emb(hidden, torch.zeros(1, 1, dtype=torch.int64))
        kwargs = {CACHE: static_cache(model, rows)[0], "position_embeddings": positions}
        with torch.no_grad():
            assert (device_step(step, hidden, kwargs) is not None) is is_served


def test_a_layer_that_differs_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    right = device.TWINS.add_norm

    def wrong(*args: Any, **options: Any) -> Any:
        total, normed = right(*args, **options)
        return total, normed * 1.01

    monkeypatch.setattr(device, "TWINS", device.Kernels(
        device.TWINS.dense, device.TWINS.packed, wrong, device.TWINS.rotary_write, device.TWINS.attention
    ))  # fmt: skip
    with pytest.raises(VerificationError, match="Leave DeviceBlockConfig out"):
        optimised("llama", monkeypatch)


def test_on_a_cpu_the_error_says_what_it_needs() -> None:
    model = build("llama")
    if torch.cuda.is_available():
        model = model.to("cpu")
    with pytest.raises(HfAccelError, match="kernels in Triton are for GPUs, the tensors are on cpu"):
        hf_accel.optimize(model, [DeviceBlockConfig()])
    assert not any(isinstance(block.layer, DeviceLayer) for block in Anatomy.of(model).blocks)


@pytest.mark.parametrize("rows", [0, 33, 1.5, None, True])
def test_max_rows(rows: Any) -> None:
    with pytest.raises(hf_accel.ConfigError, match="max_rows"):
        DeviceBlockConfig(max_rows=rows)


def test_weights_that_no_kernel_reads_are_refused() -> None:
    block = Anatomy.of(build("llama")).blocks[0]
    surroundings = Surroundings([block.layer])
    step = BlockStep(block, 16, surroundings, partial(device.DeviceBlock, kernels=device.TWINS))
    shape, weights = step.kernel.shape, step.kernel.weights
    half = replace(weights.mlp_norm, weight=weights.mlp_norm.weight.half())
    projections = (Projection(weights.projections[0].weight.T.contiguous().T), *weights.projections[1:])
    for change, message in (
        ({"mlp_norm": half}, "mlp_norm has dtype torch.float16"),
        ({"projections": projections}, "projections\\[0\\] has strides"),
        ({"o": Projection(weights.o.weight.to("meta"))}, "o lies on meta"),
        ({"o": Projection(weights.o.weight, half.weight)}, "the bias of o"),
    ):
        with pytest.raises(ValueError, match=message):
            device.DeviceBlock(shape, replace(weights, **change), device.TWINS)


@pytest.mark.parametrize(
    "change",
    [
        {"is_parallel": True},
        {"q": Heads(0, 3, 1)},
        {"gate": Heads(0, 3, 1)},
        {"rotary": "pairs"},
        {"rotary_size": 2},
        {"rotates_once": True},
        {"norms_after_rotary": True},
        {"norm_extent": "heads"},
        {"out_scale": 0.5},
        {"activation": "relu2"},
        {"part": "attention"},
        {"sinks": torch.zeros(4)},
        {"v_norm": Norm(kind="rms", eps=1e-6)},
        {"q_norm": Norm(kind="rms", eps=1e-6)},
        {"input_norm": None},
        {"input_norm": Norm(kind="layer", eps=1e-6)},
        {"gate": None, "activation": "gelu"},
    ],
    ids=str,
)
def test_layers_of_other_parts_are_refused(change: dict[str, Any]) -> None:
    block = Anatomy.of(build("llama")).blocks[0]
    step = BlockStep(block, 16, Surroundings([block.layer]), partial(device.DeviceBlock, kernels=device.TWINS))
    shape, weights = step.kernel.shape, step.kernel.weights
    of_weights = {name for name in change if name in vars(weights) and (name, change[name]) != ("gate", Heads(0, 3, 1))}
    weights = replace(weights, **{name: change[name] for name in of_weights})
    with pytest.raises(ValueError, match="layers on devices do not have"):
        device.DeviceBlock(
            replace(shape, **{k: v for k, v in change.items() if k not in of_weights}), weights, device.TWINS
        )
