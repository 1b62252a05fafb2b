"""Experts in few bits, in every layout that transformers has, against stock modules with the dequantized weights."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from fingerprint import changes, fingerprint
from models import padded, prompt
from packed_experts import (
    LAYOUTS,
    NAMES,
    PARTS,
    Squared,
    experts_of,
    mixture,
    pair,
    put_rows,
    routing,
    rows_of,
    twin_of,
)
from torch import Tensor, nn

import hf_accel
from hf_accel import GPTQConfig, WeightOnlyConfig
from hf_accel.core.calls.call import IN_PROGRESS, Request
from hf_accel.core.model.anatomy import Anatomy
from hf_accel.core.model.experts import RoutedExperts
from hf_accel.core.steps.patcher import Patcher
from hf_accel.core.steps.setting import Setting
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops.affine import Scheme, dequantize, quantize
from hf_accel.quantization.modules.experts import QuantizedExperts, SplitExperts
from hf_accel.quantization.modules.linear import QuantizedLinear

EIGHT, FOUR = WeightOnlyConfig(bits=8), WeightOnlyConfig(group_size=32)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**padded([9, 20])).logits


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def inputs(packed: Any, tokens: int = 13, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, packed.gate_up_proj[0].in_features, generator=torch.Generator().manual_seed(1))
    return hidden.to(dtype), *routing(packed.num_experts, tokens)


def one_by_one(packed: Any, *given: Tensor) -> Tensor:
    return SplitExperts.forward(packed, *given)


def is_native(packed: Any, *given: Tensor) -> bool:
    packed._routed = None
    with torch.no_grad():
        packed(*given)
    return packed._routed is not None and packed._routed.kernel is not None


@pytest.mark.parametrize("name", NAMES)
def test_packed_products_have_gate_above_up(name: str) -> None:
    original, model = mixture(name), hf_accel.optimize(mixture(name), EIGHT)
    assert experts_of(original).keys() == experts_of(model).keys()
    for path, experts in experts_of(original).items():
        packed = model.get_submodule(path)
        assert isinstance(packed, QuantizedExperts)
        assert isinstance(packed, RoutedExperts)
        for part in PARTS:
            for index, product in enumerate(getattr(packed, part)):
                expected = dequantize(quantize(rows_of(experts, part, index), Scheme(8)))
                assert torch.equal(product.weight.dequantize(), expected)
                if experts.has_bias:
                    bias = getattr(experts, f"{part}_bias")[index]
                    halves = torch.cat((bias[::2], bias[1::2])) if part == "gate_up_proj" else bias
                    assert torch.equal(product.bias, halves)
                else:
                    assert product.bias is None


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_one_call_equals_the_stock_module(name: str, dtype: torch.dtype) -> None:
    for config, bound in ((EIGHT, 1e-3), (FOUR, 3e-2)):
        packed, twin = pair(name, config, dtype)
        hidden, ids, weights = inputs(packed, dtype=dtype)
        with torch.no_grad():
            for given in (weights, weights.to(dtype)):
                expected = twin(hidden, ids, given)
                found = packed(hidden, ids, given)
                assert found.dtype is dtype
                assert distance(found, expected) < bound + (1e-2 if dtype is torch.bfloat16 else 0)
                assert torch.equal(packed(hidden[4:5], ids[4:5], given[4:5])[0], found[4])
                assert distance(one_by_one(packed, hidden, ids, given), found) < (
                    1e-2 if dtype is torch.bfloat16 else 1e-6
                )
        assert is_native(packed, hidden, ids, weights)


@pytest.mark.native
def test_experts_of_one_call_may_have_different_bits() -> None:
    packed, twin = pair("gpt_oss", FOUR)
    for index, scheme in enumerate((Scheme(8), Scheme(3, 32), Scheme(2, 32, False), Scheme(4, 32))):
        for name in PARTS:
            bias = getattr(packed, name)[index].bias
            columns = getattr(packed, name)[index].in_features
            own = scheme if columns % 32 == 0 else Scheme(8)
            made = PackedWeight.pack(quantize(rows_of(twin, name, index), own))
            getattr(packed, name)[index] = QuantizedLinear(made, bias, torch.float32)
            put_rows(twin, name, index, made.dequantize())
    given = inputs(packed)
    with torch.no_grad():
        assert distance(packed(*given), twin(*given)) < 3e-2
    assert is_native(packed, *given)
    assert packed.expert_bytes == sum(p.nbytes + p.bias.nbytes for p in (*packed.gate_up_proj, *packed.down_proj)) // 4


@pytest.mark.parametrize("way", ["native", "one by one"])
def test_ids_out_of_range_are_no_experts(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = pair("qwen3_moe", FOUR)
    if way == "one by one":
        monkeypatch.setattr("hf_accel.kernels.native.is_available", lambda: False)
    hidden, ids, weights = inputs(packed)
    with torch.no_grad():
        expected = packed(hidden, ids, torch.where(ids == 1, 0.0, weights))
        for strange in (-1, packed.num_experts, 1 << 40):
            assert torch.equal(packed(hidden, torch.where(ids == 1, strange, ids), weights), expected)
        nowhere = packed(hidden, torch.full_like(ids, packed.num_experts), weights)
    assert not nowhere.any()


def moved(packed: Any) -> dict[str, Any]:
    """What may become of the tensors and products of experts, by name."""
    product, zeros = packed.gate_up_proj[1], torch.zeros_like

    def exchange(name: str) -> None:
        product._buffers[name] = product._buffers[name].roll(1, 0).contiguous()

    return {
        "codes with other values": lambda: product.codes.zero_(),
        "codes in other memory": lambda: setattr(product.codes, "data", zeros(product.codes)),
        "other codes": lambda: exchange("codes"),
        "other scales": lambda: exchange("scales"),
        "a loaded state": lambda: packed.load_state_dict({k: v.roll(1, 0) for k, v in packed.state_dict().items()}),
        "shared memory": packed.share_memory,
        "another product": lambda: packed.gate_up_proj.__setitem__(1, copy.deepcopy(packed.gate_up_proj[0])),
        "another dense product": lambda: packed.down_proj.__setitem__(2, nn.Linear(72, 48)),
        "a hook": lambda: product.register_forward_hook(lambda module, args, out: 2 * out),
        "a forward of its own": lambda: setattr(product, "forward", lambda x: 0 * QuantizedLinear.forward(product, x)),
        "a bias": lambda: setattr(packed.down_proj[0], "bias", nn.Parameter(torch.ones(48), requires_grad=False)),
        "another limit": lambda: setattr(packed, "limit", 0.1),
        "another dtype": lambda: packed.to(torch.bfloat16).to(torch.float32),
    }


@pytest.mark.native
@pytest.mark.parametrize("change", list(moved(pair("gpt_oss", FOUR)[0])))
def test_what_becomes_of_tensors_is_followed(change: str) -> None:
    """Between calls of `generate` and outside of them; the products one by one read everything anew."""
    packed, _ = pair("gpt_oss", FOUR)
    given = inputs(packed)
    for outside in (True, False):
        token = None if outside else IN_PROGRESS.set(Request())
        try:
            with torch.no_grad():
                before = packed(*given)
                assert distance(one_by_one(packed, *given), before) < 1e-6
        finally:
            if token is not None:
                IN_PROGRESS.reset(token)
    moved(packed)[change]()
    token = IN_PROGRESS.set(Request())
    try:
        with torch.no_grad():
            found, expected = packed(*given), one_by_one(packed, *given)
    finally:
        IN_PROGRESS.reset(token)
    assert distance(found, expected) < 1e-5
    assert (distance(found, before) < 1e-2) == (change in ("shared memory", "another dtype"))
    with torch.no_grad():
        assert torch.equal(packed(*given), found)


@pytest.mark.native
def test_everything_is_looked_at_once_in_a_call_of_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf_accel.optimize(mixture("qwen3_moe"), FOUR)
    looks: list[Any] = []
    call = "hf_accel.quantization.modules.routed.RoutedCall._is_same"
    monkeypatch.setattr(call, lambda self, experts: looks.append(experts) or True)
    model.generate(prompt(), max_new_tokens=6, do_sample=False)
    model.generate(prompt(), max_new_tokens=6, do_sample=False)
    assert [len([e for e in looks if e is experts]) for experts in experts_of(model).values()] == [2, 2]
    logits(model)
    logits(model)
    assert len(looks) == 8


@pytest.mark.native
def test_gradients_autocast_and_tracing_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, twin = pair("mixtral", EIGHT)
    hidden, ids, weights = inputs(packed)
    monkeypatch.setattr("hf_accel.quantization.modules.experts.RoutedCall", None)  # whoever asks for it fails
    hidden.requires_grad_()
    for module in (packed, twin):
        hidden.grad = None
        module(hidden, ids, weights).square().sum().backward()
        module.gradient = hidden.grad
    assert distance(packed.gradient, twin.gradient) < 1e-2
    routed = weights.clone().requires_grad_()
    packed(hidden.detach(), ids, routed).sum().backward()
    assert routed.grad.abs().min() > 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert distance(packed(hidden, ids, weights), twin(hidden, ids, weights)) < 3e-2
    with torch.no_grad():
        expected = twin(hidden, ids, weights)
        assert distance(packed(hidden, ids.int(), weights), expected) < 1e-3
        for state in ("_is_compiling", "_is_tracing"):
            with monkeypatch.context() as patch:
                patch.setattr(f"hf_accel.quantization.modules.experts.{state}", lambda: True)
                assert distance(packed(hidden, ids, weights), expected) < 1e-3


@pytest.mark.parametrize("way", ["native", "one by one"])
def test_rows_are_counted_in_calls_of_generate(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf_accel.optimize(mixture("mixtral"), FOUR)
    if way == "one by one":
        monkeypatch.setattr("hf_accel.kernels.native.is_available", lambda: False)
    packed = list(experts_of(model).values())
    logits(model)
    assert not any(bool(experts.counts.any()) for experts in packed)
    chosen: list[Tensor] = []
    packed[0].register_forward_pre_hook(lambda module, args: chosen.append(args[1].flatten()))
    counts = packed[0].counts
    with torch.inference_mode():
        model.generate(prompt(), max_new_tokens=4, do_sample=False)
    packed[0].to(torch.float32)  # built anew after this
    model.generate(prompt(), max_new_tokens=4, do_sample=False)
    assert packed[0].counts is counts
    assert counts.tolist() == torch.cat(chosen).bincount(minlength=4).tolist()
    assert int(counts.sum()) == 2 * 2 * (11 + 3)
    copied = copy.deepcopy(model)
    assert not any(bool(experts.counts.any()) for experts in experts_of(copied).values())


@pytest.mark.parametrize("name", LAYOUTS)
def test_copies_pickles_and_restored_models(name: str) -> None:
    model = mixture(name)
    before, bits = fingerprint(model), logits(model)
    hf_accel.optimize(model, FOUR)
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        next(iter(experts_of(other).values())).gate_up_proj[0].codes.zero_()
        assert not torch.equal(logits(other), expected)
        assert torch.equal(logits(model), expected)
    hf_accel.restore(model)
    assert not changes(before, fingerprint(model))
    assert torch.equal(logits(model), bits)


@pytest.mark.parametrize("name", LAYOUTS)
def test_dropped_experts_are_freed_and_bytes_are_foretold(name: str) -> None:
    model = mixture(name)
    patcher = Patcher.for_config(FOUR)
    foretold = patcher.weight_bytes(Setting.of(model))
    gone = [weakref.ref(p) for e in experts_of(model).values() for p in e.parameters()]
    storages = [weakref.ref(p.untyped_storage()) for e in experts_of(model).values() for p in e.parameters()]
    hf_accel.optimize(model, FOUR, originals="drop")
    gc.collect()
    assert len(gone) >= 4
    assert not [one for one in (*gone, *storages) if one() is not None]
    assert Anatomy.of(model).weight_bytes == foretold


def test_an_unknown_gate_is_the_class_s_own_and_an_unknown_layout_is_said() -> None:
    model = mixture("olmoe")
    first, second = experts_of(model).values()
    first.act_fn = Squared()
    second.register_parameter("extra", nn.Parameter(torch.ones(3)))
    twin = copy.deepcopy(first)
    hf_accel.optimize(model, EIGHT)
    packed, left = experts_of(model).values()
    assert left is second
    assert [skip.reason for skip in hf_accel.report(model).skipped] == [
        "experts stay as they are, for their tensors are down_proj, extra, gate_up_proj: model.layers.1.mlp.experts"
    ]
    given = inputs(packed)
    with torch.no_grad():
        assert distance(packed(*given), twin_of(packed, twin)(*given)) < 1e-3
    assert not is_native(packed, *given)
    spread = mixture("olmoe")
    for experts in experts_of(spread).values():
        experts._is_expert_parallel = True
    hf_accel.optimize(spread, EIGHT)
    assert any("spread over several processes" in skip.reason for skip in hf_accel.report(spread).skipped)


@pytest.mark.parametrize("name", sorted(NAMES, key=lambda name: name not in LAYOUTS))
def test_saved_experts_come_back_to_the_bit(name: str, tmp_path: Any) -> None:
    dtype = torch.bfloat16 if name in LAYOUTS else torch.float32
    model = hf_accel.optimize(
        mixture(name, dtype), WeightOnlyConfig(bits=3, group_size=32, symmetric=name != "gpt_oss")
    )
    expected = logits(model)
    for folder in ("first", "second"):
        hf_accel.save_pretrained(model, tmp_path / folder)
        model = hf_accel.from_pretrained(tmp_path / folder)
        assert torch.equal(logits(model), expected)
    assert all(isinstance(experts, QuantizedExperts) for experts in experts_of(model).values())


def test_calibrated_experts_have_gate_above_up(tmp_path: Any) -> None:
    """Solved as rows lie, and put in order afterwards: close to the weight row by row, and not what rounding gives."""
    model, text = mixture("gpt_oss"), prompt(6, 48)
    solved = hf_accel.optimize(copy.deepcopy(model), GPTQConfig(bits=8), calibration=text)
    findings = {finding.path: finding for finding in hf_accel.report(solved).sections["gptq"].findings}
    for path, experts in experts_of(model).items():
        for part in PARTS:
            for index, product in enumerate(getattr(solved.get_submodule(path), part)):
                rows, found = rows_of(experts, part, index), product.weight.dequantize()
                assert distance(found, rows) < 0.02
                rounded = dequantize(quantize(rows, Scheme(8)))
                assert torch.equal(found, rounded) == bool(findings[f"{path}.{part}.{index}"].reason)
    hf_accel.save_pretrained(solved, tmp_path)
    assert torch.equal(logits(hf_accel.from_pretrained(tmp_path)), logits(solved))
