"""Models are rounded layer by layer to what solving each product on what it reads gives, on every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fingerprint import changes, fingerprint
from models import NAMES, build, padded, prompt
from test_quantized_peft import with_adapter
from torch import nn

import hf_accel
from hf_accel import GPTQConfig, UnsupportedModelError
from hf_accel.core.model.shadow import twin
from hf_accel.core.steps.setting import Setting
from hf_accel.measure.quality import CalibrationText
from hf_accel.ops.affine import dequantize, quantize
from hf_accel.ops.gptq import Factor, solve
from hf_accel.quantization.calibrating import layers as running
from hf_accel.quantization.calibrating.products import products_of
from hf_accel.quantization.calibrating.solving import Calibrated, Calibrator
from hf_accel.quantization.modules.linear import QuantizedLinear
from hf_accel.quantization.observing import observe
from hf_accel.quantization.targets import targets

TEXT = prompt(10, 48)
BITS_3 = GPTQConfig(bits=3, group_size=32)


def calibrated(
    model: Any, config: GPTQConfig = BITS_3, ids: torch.Tensor = TEXT
) -> tuple[list[Calibrated], Calibrator]:
    setting = Setting.of(model)
    chosen, _ = targets(setting.anatomy, config)
    run = Calibrator(twin(model), ids, chosen, config, model.dtype)
    return list(run.run()), run


@pytest.mark.parametrize("name", NAMES)
def test_every_product_gets_the_codes_that_solving_it_alone_gives(name: str) -> None:
    """The twin is observed as a whole, by a model that reads the text in one go, and each product solved by itself."""
    model = build(name)
    before = fingerprint(model)
    parts, run = calibrated(model)
    assert not run.notes, "layers can be run by themselves"
    affines = {path: affine for part in parts for path, affine in part.affines.items()}
    chosen, _ = targets(Setting.of(model).anatomy, BITS_3)
    whole = twin(model)
    products = [p for target in chosen for p in products_of(whole, target, BITS_3)]
    inner = [product for product in products if "lm_head" not in product.path and "embed_out" not in product.path]
    assert sorted(affines) == sorted(product.path for product in inner)
    read = {p.path: _Named(p.path, p.module, p.scheme) for p in inner}
    observed = observe(whole, CalibrationText(TEXT, "random", False), list(read.values()))  # type: ignore[arg-type]
    for product in inner:
        moment = observed.moments.get(product.path)
        if moment is None or moment.count < 16:
            expected = quantize(product.weight, product.scheme, torch.bfloat16)
        else:
            dtype = torch.bfloat16 if product.scheme.group_size else model.dtype
            expected = solve(product.weight, Factor.of(moment.total, 0.01, True), product.scheme, dtype).affine
        differing = (affines[product.path].codes != expected.codes).float().mean()
        assert differing < 0.01, f"{product.path}: rows read together and one by one differ in their last bits"
    assert not changes(before, fingerprint(model))


class _Named:
    """A product as `observe` takes targets."""

    def __init__(self, path: str, module: nn.Module, scheme: Any) -> None:
        self.path, self.module, self.scheme = path, module, scheme


def test_a_model_whose_layers_cannot_be_run_alone_is_read_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    expected, _ = calibrated(model)
    monkeypatch.setattr("hf_accel.quantization.calibrating.solving.layers_of", lambda model, ids: ([], "a reason"))
    monkeypatch.setattr("hf_accel.quantization.calibrating.solving._MOMENTS_BYTES", 60_000)
    found, run = calibrated(model, GPTQConfig(bits=3, group_size=32, refine_steps=2, folder="not made"))
    assert run.notes == [
        "the model was read as a whole: a reason",
        "nothing was refined, since layers cannot be run by themselves",
        "nothing was kept in folder, since layers cannot be run by themselves",
    ]
    assert len(found) > 3, "in portions"
    merged = {path: affine for part in found for path, affine in part.affines.items()}
    for part in expected:
        for path, affine in part.affines.items():
            assert (merged[path].codes != affine.codes).float().mean() < 0.01


def test_layers_that_depend_on_more_than_their_input_are_not_run_alone() -> None:
    def with_row(change: Any) -> str:
        model = build("llama")
        inner = model.model.layers[1]
        forward = inner.forward
        inner.forward = lambda hidden_states, *args, **kwargs: forward(change(hidden_states), *args, **kwargs)
        found, reason = running.layers_of(model, TEXT)
        assert bool(found) == (not reason)
        return reason

    assert not with_row(lambda x: x)
    count = [0.0]

    def counting(x: torch.Tensor) -> torch.Tensor:
        count[0] += 1.0
        return x * count[0]

    assert "computes something else by itself" in with_row(counting)
    model = build("llama")
    norm = nn.LayerNorm(model.config.hidden_size, bias=False)
    first = model.model.layers[0]
    original = first.forward
    first.forward = lambda *args, **kwargs: (original(*args, **kwargs), None)[0]
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (norm(args[0] * 7 + 1), *args[1:]))
    assert "reads something else than what that gives" in running.layers_of(model, TEXT)[1]
    model = build("llama")
    ids: list[torch.Tensor] = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: ids.append(args[0]))
    model.model.layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"per_token": ids[-1]}), with_kwargs=True
    )
    assert "depends on the text" in running.layers_of(model, TEXT)[1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_refining_brings_layers_closer_and_leaves_the_model(name: str) -> None:
    model = build(name)
    before = fingerprint(model)
    plain, _ = calibrated(model)
    better, _ = calibrated(model, GPTQConfig(bits=3, group_size=32, refine_steps=30))
    assert not changes(before, fingerprint(model))
    assert all(parameter.grad is None for parameter in model.parameters())

    def error(parts: list[Calibrated]) -> float:
        trial = twin(model)
        config = BITS_3
        for part in parts:
            for target in part.targets:
                for product in products_of(trial, target, config):
                    weight = dequantize(part.affines[product.path])
                    laid = weight if isinstance(product.module, nn.Linear) else weight.T
                    product.module._parameters["weight"] = nn.Parameter(laid.contiguous())
        with torch.no_grad():
            reference = model(TEXT, output_hidden_states=True).hidden_states[-1]
            return float((trial(TEXT, output_hidden_states=True).hidden_states[-1] - reference).norm())

    assert error(better) < 0.97 * error(plain)


def test_activations_lie_in_a_file_where_they_are_large_and_change_nothing() -> None:
    model = build("qwen2")
    config = GPTQConfig(bits=3, group_size=32, refine_steps=3)
    expected, _ = calibrated(model, config)
    found, _ = calibrated(model, GPTQConfig(bits=3, group_size=32, refine_steps=3, max_activation_bytes=0))
    assert len(found) == len(expected) == 2
    for one, two in zip(expected, found, strict=True):
        for path, affine in one.affines.items():
            assert torch.equal(affine.codes, two.affines[path].codes)
            assert torch.equal(affine.scales, two.affines[path].scales)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("originals", ["keep", "drop"])
def test_optimised_models_compute_with_the_codes(name: str, originals: str) -> None:
    model, reference = build(name), build(name)
    ids = prompt(3, 40, seed=5)
    parts, _ = calibrated(reference, ids=TEXT)
    hf_accel.optimize(model, BITS_3, calibration=torch.cat([TEXT, prompt(2, 48, seed=9)]), originals=originals)
    report = hf_accel.report(model)
    assert report.gptq.notes[0] == "calibrated on 480 tokens of the text given, 10 rows of 48"
    modules = dict(model.named_modules())
    for part in parts:
        for path, affine in part.affines.items():
            assert isinstance(modules[path], QuantizedLinear)
            assert torch.equal(modules[path].packed.unpack().codes, affine.codes), path
    assert report.quality.tokens == 2 * 47, "measured on what is kept back"
    text = str(report)
    assert "calibration: " in text
    assert "of codes differ" in text
    products = report.to_dict()["gptq"]["products"]
    assert [product["path"] for product in products] == [path for part in parts for path in part.affines]
    assert all(p["error"] <= p["error_of_rounding"] for p in products if p["tokens"] >= 300)
    assert model.generate(ids, max_new_tokens=8, do_sample=False).shape == (3, 48)
    if originals == "keep":
        hf_accel.restore(model)
        assert torch.equal(model(ids).logits, reference(ids).logits)


def test_no_text_is_needed_and_little_text_is_told() -> None:
    model = build("llama")
    hf_accel.optimize(model, BITS_3)
    notes = hf_accel.report(model).gptq.notes
    assert "of the model's own samples" in notes[0]
    hf_accel.restore(model)
    hf_accel.optimize(model, BITS_3, calibration=prompt(2, 64))
    assert "fewer tokens than the" in hf_accel.report(model).gptq.notes[1]


def test_bad_text_and_bad_numbers() -> None:
    model = build("llama")
    before = fingerprint(model)
    with pytest.raises(hf_accel.ConfigError, match="tells too little; give 64 or more"):
        hf_accel.optimize(model, BITS_3, calibration=prompt(2, 30))
    with pytest.raises(hf_accel.ConfigError, match="a row has two or more"):
        hf_accel.optimize(model, BITS_3, calibration=torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(hf_accel.ConfigError, match="has 0 tokens"):
        hf_accel.optimize(model, BITS_3, calibration=torch.zeros(0, 4, dtype=torch.long))
    assert not changes(before, fingerprint(model))
    hook = model.model.layers[1].mlp.act_fn.register_forward_hook(lambda m, a, output: output * float("nan"))
    bad = build("llama")
    with torch.no_grad():
        bad.model.layers[1].mlp.up_proj.weight.mul_(3e38)
    was = fingerprint(bad)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.down_proj reads NaN or infinity"):
        hf_accel.optimize(bad, BITS_3, calibration=TEXT)
    assert not changes(was, fingerprint(bad))
    hook.remove()
    for values, words in [
        ({"bits": 5}, r"GPTQConfig.bits is 2, 3, 4 or 8; 5 was given"),
        ({"order": "group"}, r'GPTQConfig.order is "static" or None'),
        ({"damping": 0}, r"GPTQConfig.damping is a number in \(0, 1\]; 0 was given"),
        ({"damping": True}, r"GPTQConfig.damping is a number"),
        ({"refine_steps": -1}, r"GPTQConfig.refine_steps is a whole number, at least 0"),
        ({"folder": 3}, r"GPTQConfig.folder is the name of a folder or None; 3 was given"),
    ]:
        with pytest.raises(hf_accel.ConfigError, match=words):
            GPTQConfig(**values)  # type: ignore[arg-type]


def test_a_share_of_products_that_are_only_rounded_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    before = fingerprint(model)
    monkeypatch.setattr("hf_accel.quantization.calibrating.solving.LEAST_TOKENS", 10**9)
    with pytest.raises(UnsupportedModelError, match=r"100% of the weights could not be calibrated \(model\.layers\.0"):
        hf_accel.optimize(model, BITS_3, calibration=TEXT)
    assert not changes(before, fingerprint(model))
    monkeypatch.undo()

    def identity(moment: torch.Tensor, damping: float, is_ordered: bool) -> Factor:
        return _FACTOR(torch.eye(len(moment), dtype=torch.float64), damping, is_ordered)

    monkeypatch.setattr(Factor, "of", staticmethod(identity))
    with pytest.raises(UnsupportedModelError, match="calibrating gained nothing"):
        hf_accel.optimize(model, BITS_3, calibration=TEXT)
    assert not changes(before, fingerprint(model))


_FACTOR = Factor.of


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_calls_of_all_kinds_give_what_the_codes_give() -> None:
    """The twin computes with the dequantized weights; adapters, padding, sampling and stop strings are as on it."""
    model, twins = build("llama"), build("llama")
    hf_accel.optimize(model, BITS_3, calibration=TEXT)
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            with torch.no_grad():
                twins.get_submodule(path).weight.copy_(module.packed.dequantize(torch.float32))
    given = padded([5, 17, 30])
    with torch.no_grad():
        expected, found = twins(**given).logits, model(**given).logits
    assert float((found - expected).norm()) < 0.02 * float(expected.norm())
    wrapped = with_adapter(model, "llama")
    sampled = {"do_sample": True, "top_k": 5, "max_new_tokens": 6, "num_return_sequences": 2}
    for options in ({"max_new_tokens": 6, "do_sample": False}, sampled):
        texts = []
        for _ in range(2):
            torch.manual_seed(3)
            texts.append(wrapped.generate(**given, **options))
        assert torch.equal(*texts)
