"""Adapters beside packed weights: put on before and after, trained, saved; merging is refused and harms nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build, padded, prompt
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hf_accel
from hf_accel import WeightOnlyConfig
from hf_accel.quantization import QuantizedLinear

# peft 0.21 asks transformers 5.23 for an attribute under its old name
pytestmark = [pytest.mark.peft, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")]
NAMES = ["llama", "qwen2", "gpt2", "mixtral"]
TARGETS = {"gpt2": ["c_attn", "c_proj"]}
CONFIGS = {"8 bits": WeightOnlyConfig(bits=8), "4 bits": WeightOnlyConfig(group_size=32)}


def with_adapter(model: Any, name: str, *, zero: bool = False) -> Any:
    """Wrap `model` by one adapter that changes the text, or with zero=True by one freshly made."""
    from peft import LoraConfig, get_peft_model

    targets = TARGETS.get(name, ["q_proj", "v_proj", "o_proj"])
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key and not (zero and "lora_B" in key):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


def quantized(name: str, config: str = "4 bits") -> Any:
    return hf_accel.optimize(build(name), CONFIGS[config])


def dequantized(name: str, config: str = "4 bits") -> Any:
    """Return a stock model with the weights that the codes stand for."""
    twin = build(name)
    places = dict(twin.named_modules())
    for path, module in quantized(name, config).named_modules():
        place: Any = places.get(path)
        if isinstance(module, QuantizedLinear) and place is not None:
            weight = module.packed.dequantize()
            place.weight = nn.Parameter(weight.T.contiguous() if isinstance(place, Conv1D) else weight)
        elif hasattr(module, "original_class"):  # experts
            for own in ("gate_up_proj", "down_proj"):
                products = getattr(module, own)
                getattr(place, own).data = torch.stack([product.packed.dequantize() for product in products])
    return twin


def text(model: Any) -> Tensor:
    return model.generate(**padded([4, 9]), max_new_tokens=10, do_sample=False)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**padded([9, 20])).logits


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_on_a_quantized_model(name: str, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = quantized(name, config)
    bare_text, bare = text(base), logits(base)
    wrapped = with_adapter(base, name)
    assert not torch.equal(text(wrapped), bare_text)
    with wrapped.disable_adapter():
        assert torch.equal(text(wrapped), bare_text)
        assert torch.equal(logits(wrapped), bare)
    monkeypatch.setattr("hf_accel.kernels.native.is_available", lambda: False)  # then nothing is rounded
    assert distance(logits(wrapped), logits(with_adapter(dequantized(name, config), name))) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_adapter_before_optimising(name: str) -> None:
    stock = with_adapter(build(name), name)
    expected = logits(stock)
    layers = {path for path, module in stock.named_modules() if hasattr(module, "base_layer")}
    assert layers
    hf_accel.optimize(stock, CONFIGS["4 bits"])
    modules = dict(stock.named_modules())
    for path in layers:
        assert isinstance(modules[f"{path}.base_layer"], QuantizedLinear)
        assert type(modules[f"{path}.lora_A.default"]) is nn.Linear
        assert type(modules[f"{path}.lora_B.default"]) is nn.Linear
    assert torch.equal(logits(stock), logits(with_adapter(quantized(name), name)))
    text(stock)
    hf_accel.restore(stock)
    assert torch.equal(logits(stock), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_training_reaches_the_adapter_alone(name: str) -> None:
    """Gradients equal those of the dequantized twin: exactly its mathematics, on activations that were rounded."""
    ids = prompt(2, 12)
    found: list[dict[str, Tensor]] = []
    for base in (quantized(name, "8 bits"), dequantized(name, "8 bits")):
        model = with_adapter(base, name, zero=True)
        packed = {path: module.codes.clone() for path, module in model.named_modules() if hasattr(module, "codes")}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        before = model(input_ids=ids, labels=ids).loss
        before.backward()
        gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        assert gradients
        assert all("lora_" in key for key in gradients)
        found.append(gradients)
        total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        for group in optimizer.param_groups:
            group["lr"] = 0.02 / float(total)
        optimizer.step()
        with torch.no_grad():
            assert model(input_ids=ids, labels=ids).loss < before
        for path, module in model.named_modules():
            assert path not in packed or torch.equal(module.codes, packed[path])
    assert found[0].keys() == found[1].keys()
    for key in found[1]:
        if "lora_B" in key:  # of lora_A the gradient is zero where lora_B is
            assert distance(found[0][key], found[1][key]) < 2e-2, key


@pytest.mark.parametrize("config", CONFIGS)
def test_the_gradient_to_the_input_is_that_of_the_dequantized_product(config: str) -> None:
    for name in ("llama", "gpt2"):
        for module in quantized(name, config).modules():
            if not isinstance(module, QuantizedLinear):
                continue
            x = torch.randn(2, 3, module.in_features, requires_grad=True)
            twin = x.detach().clone().requires_grad_()
            outward = torch.randn(2, 3, module.out_features)
            module(x).backward(outward)
            nn.functional.linear(twin, module.packed.dequantize(), module.bias).backward(outward)
            assert x.grad is not None
            assert distance(x.grad, twin.grad) < 1e-6
            assert all(parameter.grad is None for parameter in module.parameters())


def adapted_layer(model: Any) -> Any:
    return next(module for module in model.modules() if hasattr(module, "base_layer"))


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_merging_is_refused_and_harms_nothing(name: str, safe: bool) -> None:
    model = with_adapter(quantized(name), name)
    expected, words = logits(model), text(model)
    codes = copy.deepcopy(adapted_layer(model).base_layer.codes)
    for verb in (model.merge_adapter, model.merge_and_unload, lambda **options: adapted_layer(model).merge(**options)):
        options = {"safe_merge": safe}
        with pytest.raises(hf_accel.UnsupportedModelError, match=r"stored in 4 bits|stored in 8 bits"):
            verb(**options)
        assert torch.equal(logits(model), expected)
    assert torch.equal(adapted_layer(model).base_layer.codes, codes)
    assert torch.equal(text(model), words)


def test_after_restoring_the_adapter_merges_into_the_originals() -> None:
    model = with_adapter(quantized("llama"), "llama")
    base = model.unload()
    hf_accel.restore(base)
    merged, expected = with_adapter(base, "llama"), with_adapter(build("llama"), "llama")
    assert torch.equal(logits(merged.merge_and_unload()), logits(expected.merge_and_unload()))


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_is_saved_and_loaded_beside_packed_weights(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = with_adapter(quantized(name), name)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size > 0
    assert not list(tmp_path.glob("model*.safetensors"))
    again = PeftModel.from_pretrained(quantized(name), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    stock = PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert torch.equal(logits(stock), logits(with_adapter(build(name), name)))
