"""Models in 3 and 2 bits: against stock models with dequantized weights, in native layers, in batches, and undone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fingerprint import changes, fingerprint
from models import padded, prompt
from quantized_files import wide
from test_quantization import distance, greedy, logits

import hf_accel
from hf_accel import DecoderBlockConfig, NativeLinearConfig, WeightOnlyConfig
from hf_accel.core.steps.patcher import Patcher
from hf_accel.core.steps.setting import Setting
from hf_accel.ops.affine import Scheme
from hf_accel.quantization import QuantizedLinear
from hf_accel.quantization.patcher import packed_bytes

CONFIGS = {
    "3 bits": WeightOnlyConfig(bits=3, group_size=32),
    "2 bits": WeightOnlyConfig(bits=2, group_size=32),
    "3 bits, zeros": WeightOnlyConfig(bits=3, group_size=32, symmetric=False),
    "2 bits, zeros": WeightOnlyConfig(bits=2, group_size=32, symmetric=False),
    "mixed": WeightOnlyConfig(bits=3, group_size=32, layers={"*.0.*": 2, "*.1.*o_proj": 4, "*.1.*v_proj": 8}),
}


def stock_twin(model: Any) -> Any:
    """Return a stock model with the weights that the codes of `model` stand for."""
    twin = wide()
    places: dict[str, Any] = dict(twin.named_modules())
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            places[path].weight = torch.nn.Parameter(module.packed.dequantize())
    return twin


@pytest.mark.parametrize("title", CONFIGS)
def test_logits_are_those_of_the_dequantized_weights(title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf_accel.optimize(wide(), CONFIGS[title])
    bits = {module.scheme.bits for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert bits == ({2, 3, 4, 8} if title == "mixed" else {CONFIGS[title].bits, 8})
    expected = logits(stock_twin(model))
    assert distance(expected, logits(wide())) > 0.05, "rounding shows"
    assert distance(logits(model), expected) < 0.1  # activations of 8 bits
    monkeypatch.setattr("hf_accel.kernels.native.is_available", lambda: False)  # then nothing is rounded
    assert distance(logits(model), expected) < 1e-5


@pytest.mark.parametrize("title", CONFIGS)
def test_native_layers_write_the_same_text(title: str) -> None:
    plain = hf_accel.optimize(wide(), CONFIGS[title])
    served = hf_accel.optimize(wide(), [CONFIGS[title], NativeLinearConfig(), DecoderBlockConfig()])
    assert not [skip for skip in hf_accel.report(served).skipped if "runs as it is" in skip.reason]
    one = prompt()
    for options in ({}, {"input_ids": one, "attention_mask": torch.ones_like(one)}, {"num_beams": 3}):
        assert torch.equal(greedy(plain, **options), greedy(served, **options))


@pytest.mark.parametrize("title", CONFIGS)
def test_left_padded_rows_equal_rows_alone(title: str) -> None:
    model = hf_accel.optimize(wide(), [CONFIGS[title], DecoderBlockConfig()])
    lengths = [4, 11, 7]
    batch = padded(lengths)
    together = greedy(model, **batch)
    for row, length in enumerate(lengths):
        ids = batch["input_ids"][row : row + 1, -length:]
        alone = greedy(model, input_ids=ids, attention_mask=torch.ones_like(ids))
        assert torch.equal(alone[0, length:], together[row, max(lengths) :])


@pytest.mark.parametrize("title", CONFIGS)
def test_restore_gives_everything_back(title: str) -> None:
    model = wide()
    before, expected = fingerprint(model), logits(model)
    hf_accel.optimize(model, CONFIGS[title])
    assert not torch.equal(logits(copy.deepcopy(model)), expected)
    hf_accel.restore(model)
    assert not changes(before, fingerprint(model))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("title", CONFIGS)
def test_the_plan_promises_the_bytes_that_come(title: str, dtype: torch.dtype) -> None:
    model = wide(dtype)
    promised = Patcher.for_config(CONFIGS[title]).weight_bytes(Setting.of(model))
    hf_accel.optimize(model, CONFIGS[title], originals="drop")
    assert hf_accel.report(model).patched_weight_bytes == promised
    assert logits(model).isfinite().all()


def test_fewer_bits_take_fewer_bytes() -> None:
    sizes = [packed_bytes(Scheme(bits, 64), 512, 2048, torch.bfloat16) for bits in (2, 3, 4)]
    assert sizes == [512 * 2048 * (4 * bits + 1) // 32 for bits in (2, 3, 4)]


def test_what_groups_do_not_divide_stays_at_8_bits() -> None:
    model = hf_accel.optimize(wide(), WeightOnlyConfig(bits=2, group_size=64))
    schemes = {path: module.scheme for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert schemes["model.layers.0.self_attn.q_proj"] == Scheme(2, 64)
    assert schemes["model.layers.0.mlp.down_proj"] == Scheme(8), "96 columns"
    assert any("kept at 8 bits" in skip.reason for skip in hf_accel.report(model).skipped)
