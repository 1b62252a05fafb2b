"""Training in few bits: gradients are the textbook's, what is deployed is what was trained, and restore undoes it."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from typing import Any

import pytest
import torch
from fingerprint import changes, fingerprint
from models import build, prompt
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_accel
from hf_accel import QATConfig
from hf_accel.errors import ConfigError, ConflictError, UnsupportedModelError
from hf_accel.kernels.packed import dequantized_linear
from hf_accel.ops.affine import Affine, Scheme, quantize
from hf_accel.ops.fake_quantize import INSIDE, PACE, clipped, fake_quantized, inside, learned_affine, learned_scales
from hf_accel.quantization import starting
from hf_accel.quantization.learned import trained_products
from hf_accel.quantization.modules.fake_linear import FakeQuantizedLinear
from hf_accel.quantization.modules.linear import QuantizedLinear

IDS = prompt(24, 4)
SCHEMES = [Scheme(2, 32), Scheme(3, 32), Scheme(4, 32, symmetric=False), Scheme(8)]


@functools.cache
def _original(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=False, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def original(dtype: torch.dtype = torch.float32) -> Any:
    """Return a new model whose products have groups of 32 columns."""
    return copy.deepcopy(_original(dtype))


def trained(model: Any, steps: int = 4, rate: float = 3e-3) -> Any:
    """Train whatever of a model is trained towards its texts."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def few(bits: int = 2, **options: Any) -> QATConfig:
    """Return a config that starts without text."""
    return QATConfig(**({"bits": bits, "group_size": 32, "start": "nearest"} | options))


def in_training(bits: int = 2, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return hf_accel.optimize(original(dtype), [few(bits, **options)])


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


def products(model: Any) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def drawn(scheme: Scheme, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Affine, Tensor]:
    """Return a weight [8, 64] that has drifted beyond its codes here and there, the start, and log factors."""
    generator = torch.Generator().manual_seed(scheme.bits)
    weight = torch.randn(8, 64, generator=generator)
    start = quantize(weight, scheme, dtype)
    moved = weight + 0.3 * torch.randn(8, 64, generator=generator)
    return moved, start, 0.1 * torch.randn(start.scales.shape, generator=generator)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.bits} bits")
def test_rounding_and_gradients_are_the_textbooks(scheme: Scheme) -> None:
    """Esser et al. 2020, equations 1 to 3, weight by weight in Python's own floats."""
    weight, start, logs = drawn(scheme)
    for tensor in (weight, logs):
        tensor.requires_grad_()
    found = fake_quantized(weight, start.scales, logs, start.zeros, scheme, torch.bfloat16, torch.float32)
    slope = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    found.backward(slope)
    groups, beyond = start.scales.shape[1], 0
    scales, values = learned_scales(start.scales, logs.detach(), torch.bfloat16).tolist(), weight.tolist()
    to_weight, to_logs = weight.grad.tolist(), logs.grad.tolist()
    for row, group in itertools.product(range(8), range(groups)):
        scale, total = scales[row][group], 0.0
        zero = 0 if start.zeros is None else int(start.zeros[row, group])
        for column in range(group * 64 // groups, (group + 1) * 64 // groups):
            steps = values[row][column] / scale
            code = min(max(round(steps) + zero, scheme.lowest), scheme.highest)
            is_clipped = not scheme.lowest - 0.5 <= steps + zero <= scheme.highest + 0.5
            beyond += is_clipped
            assert found[row, column].item() == pytest.approx((code - zero) * scale, rel=1e-6)
            assert to_weight[row][column] == (0 if is_clipped else slope[row, column].item())
            total += slope[row, column].item() * (code - zero - (0 if is_clipped else steps))
        total *= scale * PACE / math.sqrt(64 // groups * max(1, scheme.highest))
        assert to_logs[row][group] == pytest.approx(total, rel=1e-3, abs=1e-4)
    assert beyond or scheme.bits == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_are_values_of_the_type_they_are_stored_in(dtype: torch.dtype) -> None:
    start, logs = torch.tensor([[0.1, -0.2]]).to(dtype).float(), torch.tensor([[0.123, -0.456]])
    found = learned_scales(start, logs, dtype)
    assert torch.equal(found, found.to(dtype).float())
    assert torch.equal(learned_scales(start, torch.zeros(1, 2), dtype), start), "the start's scales are kept"
    torch.testing.assert_close(found, start * (PACE * logs).exp(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.bits} bits")
def test_training_begins_with_the_codes_of_the_start(scheme: Scheme) -> None:
    """Also with codes that are nowhere near the weight, and with scales below zero."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(8, 64, generator=generator)
    codes = torch.randint(scheme.lowest, scheme.highest + 1, (8, 64), generator=generator).to(torch.int8)
    groups = 64 // scheme.columns_per_scale(64)
    signs = torch.randint(0, 2, (8, groups), generator=generator) * 2 - 1
    scales = ((torch.rand(8, groups, generator=generator) + 0.1) * signs).bfloat16().float()
    zeros = None if scheme.symmetric else torch.randint(-3, 4, (8, groups), generator=generator).to(torch.int8)
    start = Affine(codes, scales, zeros, scheme)
    began = inside(weight, start)
    assert torch.equal(learned_affine(began, scales, zeros, scheme).codes, codes)
    assert not clipped(began, start).any()
    near = learned_affine(weight, scales, zeros, scheme)
    same = (near.codes == codes) & ~clipped(weight, start)
    steps = weight.view(8, groups, -1) / scales[..., None]
    offset = (steps - steps.round()).abs().view(8, 64)
    torch.testing.assert_close(began[same & (offset < INSIDE)], weight[same & (offset < INSIDE)])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_life_from_start_to_restore(bits: int, dtype: torch.dtype) -> None:
    model, before = original(dtype), logits(original(dtype))
    print_of = fingerprint(model)
    config = few(bits)
    assert hf_accel.optimize(model, [config]) is model
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(learning) == 28
    assert all(name.endswith((".weight", ".log_factors")) and "proj" in name for name in learning)
    fake = trained(model, rate=3e-3 * 4 / bits)
    expected = logits(fake)
    assert not torch.equal(expected, before)
    told = hf_accel.report(model).qat
    shares = told.to_dict()
    assert 0 < shares["changed"] < 1
    assert len(shares["products"]) == 14

    weights = {path: module.affine() for path, _, _, module in trained_products(model)}
    assert hf_accel.convert_qat(model) is model
    deployed = products(model)
    assert deployed.keys() == weights.keys()
    for path, product in deployed.items():
        assert torch.equal(product.packed.unpack().codes, weights[path].codes)
        assert torch.equal(product.packed.unpack().scales, weights[path].scales)
    assert hf_accel.report(model).qat.to_dict() == shares
    assert "changed since the start" in str(hf_accel.report(model))
    assert hf_accel.report(model).patched_weight_bytes < hf_accel.report(model).weight_bytes
    # the kernels round activations, to 8 bits for 4 bits and fewer
    norm = expected.float().norm()
    assert (logits(model).float() - expected.float()).norm() < (0.03 if dtype is torch.float32 else 0.06) * norm
    for product in deployed.values():
        product.product = functools.partial(_dequantized, product)
    difference = (logits(model).float() - expected.float()).norm() / norm
    assert difference < (1e-6 if dtype is torch.float32 else 1e-2)

    hf_accel.restore(model)
    assert not changes(print_of, fingerprint(model))
    assert torch.equal(logits(model), before)


def _dequantized(product: QuantizedLinear, x: Tensor) -> Tensor:
    return dequantized_linear(x, product.packed, product.bias)


def test_a_converted_copy_is_a_model_of_its_own(tmp_path: Any) -> None:
    model = trained(in_training(4))
    expected = logits(model)
    copied = hf_accel.convert_qat(copy.deepcopy(model))
    assert torch.equal(logits(model), expected)
    assert (logits(copied) - expected).norm() < 0.03 * expected.norm()
    with pytest.raises(ConflictError, match="not optimised"):
        hf_accel.report(copied)
    hf_accel.save_pretrained(copied, tmp_path)
    assert torch.equal(logits(hf_accel.from_pretrained(tmp_path)), logits(copied))
    hf_accel.optimize(copied, "exact")
    hf_accel.restore(model)


def test_a_start_of_another_method_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start says codes and scales by path; they are what the model computes with before the first step."""
    given: dict[str, Affine] = {}

    def coarse(setting: Any, chosen: Any, config: Any, refine_steps: int) -> dict[str, Affine]:
        for target in chosen:
            found = quantize(target.module.weight.detach(), target.scheme, torch.bfloat16)
            given[target.path] = Affine((found.codes // 2).to(torch.int8), found.scales, None, found.scheme)
        return given

    monkeypatch.setitem(starting.STARTS, "coarse", coarse)
    model = in_training(3, start="coarse")
    for path, _, _, module in trained_products(model):
        assert torch.equal(module.affine().codes, given[path].codes)
        assert torch.equal(module.affine().scales, given[path].scales.float())
    monkeypatch.setitem(starting.STARTS, "coarse", lambda *_: {})
    other = original()
    with pytest.raises(UnsupportedModelError, match=r"says nothing of model\.layers\.0"):
        hf_accel.optimize(other, [few(3, start="coarse")])
    assert torch.equal(logits(other), logits(original()))


def test_training_starts_from_what_gptq_chooses() -> None:
    text = prompt(64, 40)
    model = hf_accel.optimize(original(), [QATConfig(bits=3, group_size=32, layers={"*.q_proj": 4})], calibration=text)
    packed = hf_accel.optimize(
        original(), [hf_accel.GPTQConfig(bits=3, group_size=32, layers={"*.q_proj": 4}, head=None)], calibration=text
    )
    expected = {path: product.packed.unpack() for path, product in products(packed).items()}
    found = {path: module.affine() for path, _, _, module in trained_products(model)}
    assert found.keys() == expected.keys()
    for path, affine in found.items():
        assert torch.equal(affine.codes, expected[path].codes), path
        assert torch.equal(affine.scales, expected[path].scales), path
    rounded = in_training(3, layers={"*.q_proj": 4})
    for path, _, _, module in trained_products(rounded):
        assert not torch.equal(module.start_codes, found[path].codes), path
    head = hf_accel.optimize(original(), [QATConfig(bits=3, group_size=32, head=8)], calibration=text)
    assert head.lm_head.scheme.bits == 8


def test_weights_stay_in_single_precision_when_the_model_is_cast() -> None:
    model = in_training(2)
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.bfloat16()
    for path, _, _, module in trained_products(model):
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, bits[f"{path}.{name}"]), f"{path}.{name}"
    assert logits(model).dtype is torch.bfloat16


def test_learned_scales_can_be_left_alone_and_layers_left_out() -> None:
    model = trained(in_training(2, learn_scales=False, layers={"*.down_proj": None, "*.q_proj": 4}))
    modules = {path: module for path, _, _, module in trained_products(model)}
    assert len(modules) == 12
    assert not any("down_proj" in path for path in modules)
    assert {module.scheme.bits for path, module in modules.items() if "q_proj" in path} == {4}
    assert not any(module.log_factors.any() for module in modules.values())
    hf_accel.convert_qat(model)
    assert "12 products trained and packed" in str(hf_accel.report(model))


def test_a_product_with_a_bias_and_gpt2s_layout() -> None:
    model = build("gpt2")
    before = fingerprint(model)
    hf_accel.optimize(model, [few(4, group_size=None)])
    trained(model)
    expected = logits(model)
    hf_accel.convert_qat(model)
    assert (logits(model) - expected).norm() < 0.05 * expected.norm()
    hf_accel.restore(model)
    assert not changes(before, fingerprint(model))


REFUSED = [
    ({"bits": 5}, "bits is 2, 3, 4 or 8"),
    ({"bits": 2, "group_size": 48}, "group_size is one of"),
    ({"bits": 2, "learn_scales": 1}, "learn_scales is True or False"),
    ({"bits": 2, "start": "best"}, "start is one of"),
    ({"bits": 8, "symmetric": False}, "symmetric"),
]


@pytest.mark.parametrize("values,message", REFUSED)
def test_values_that_do_not_fit_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"QATConfig\.{message}"):
        QATConfig(**values)


def test_what_cannot_be_trained_is_refused() -> None:
    quantized = hf_accel.optimize(original(), [hf_accel.WeightOnlyConfig(bits=4)])
    with pytest.raises(UnsupportedModelError, match="quantized already"):
        hf_accel.optimize(copy.deepcopy(quantized), [few()])
    tied = build("qwen2")
    with pytest.raises(UnsupportedModelError, match="tied to the embeddings"):
        hf_accel.optimize(tied, [few(head=8)])
    broken = original()
    broken.model.layers[1].mlp.up_proj.weight.data[3, 4] = math.nan
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.up_proj holds NaN"):
        hf_accel.optimize(broken, [few()])
    with pytest.raises(UnsupportedModelError, match="matches no module"):
        hf_accel.optimize(original(), [few(layers={"*.qkv": 4})])


def test_what_cannot_be_deployed_is_refused_and_left_as_it_is() -> None:
    plain = original()
    with pytest.raises(UnsupportedModelError, match="No product of this LlamaForCausalLM is in training"):
        hf_accel.convert_qat(plain)
    with pytest.raises(UnsupportedModelError, match="No product of this str"):
        hf_accel.convert_qat("model")
    model = in_training(2)
    with pytest.raises(UnsupportedModelError, match="nothing was trained"):
        hf_accel.convert_qat(model)
    trained(model)
    expected = logits(model)
    off = model.model.layers[1].mlp.up_proj
    off.is_on = False
    with pytest.raises(UnsupportedModelError, match=r"off in model\.layers\.1\.mlp\.up_proj"):
        hf_accel.convert_qat(model)
    off.is_on = True
    for tensor, value in ((off.weight, math.nan), (off.log_factors, -math.inf)):
        kept = tensor.data.clone()
        tensor.data[0, 0] = value
        with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.up_proj holds .* diverged"):
            hf_accel.convert_qat(model)
        tensor.data.copy_(kept)
    assert torch.equal(logits(model), expected)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    assert not hasattr(model, "hf_quantizer")
    with pytest.raises(UnsupportedModelError, match="convert_qat"):
        hf_accel.save_pretrained(model, "nowhere")
    hf_accel.convert_qat(model)
    with pytest.raises(UnsupportedModelError, match="in training"):
        hf_accel.convert_qat(model)


def test_products_that_are_off_compute_with_their_weights() -> None:
    model = in_training(2)
    for _, _, _, module in trained_products(model):
        module.is_on = False
    module: FakeQuantizedLinear = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64)
    assert torch.equal(module(x), nn.functional.linear(x, module.weight))
