"""Activation-aware scaling: the same function before rounding, the exponents of a textbook, and nothing left behind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fingerprint import changes, fingerprint
from mixtures import MIXTURES
from models import TINY, UNDESCRIBED, build, prompt, randomize
from test_calibrating import calibrated
from test_calibrating_resume import Killed, killing, same, state
from torch import Tensor, nn

import hf_accel
from hf_accel import ConfigError, GPTQConfig, UnsupportedModelError
from hf_accel.core.model.anatomy import Anatomy
from hf_accel.core.model.shadow import twin
from hf_accel.core.steps.applying import applied
from hf_accel.core.steps.plan import Plan
from hf_accel.core.steps.setting import Setting
from hf_accel.measure.quality import CalibrationText
from hf_accel.ops.affine import dequantize, quantize
from hf_accel.quantization.calibrating import scaling
from hf_accel.quantization.calibrating.activations import Room, Stream
from hf_accel.quantization.calibrating.layers import first_inputs, layers_of
from hf_accel.quantization.calibrating.products import products_of, within
from hf_accel.quantization.targets import targets

TEXT = prompt(10, 48)
AWQ = GPTQConfig(bits=3, group_size=32, scaling="awq", solver="nearest", head=None)
BOTH = GPTQConfig(bits=3, group_size=32, scaling="awq", head=None)
DESCRIBED = [
    name for name in TINY if any(b.form.norms["input"].kind.startswith("rms") for b in Anatomy.of(build(name)).blocks)
]


def uneven(name: str, heads: int | None = None) -> Any:
    """Return a model in whose widths groups fit, with channels that are read much more strongly than others.

    heads: of keys and values; None: as many as the tiny model of this name has.
    """
    wide = copy.deepcopy(build(name).config)
    wide.hidden_size, wide.intermediate_size, wide.num_hidden_layers = 64, 96, 2
    wide.num_key_value_heads = heads or wide.num_key_value_heads
    if getattr(wide, "layer_types", None) is not None:
        wide.layer_types = wide.layer_types[-2:]
    model = type(build(name))(wide).eval()
    randomize(model, TINY[name])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in Anatomy.of(model).blocks:
            for norm in (block.norm("input"), block.norm("mlp")):
                strong = torch.rand(len(norm.weight), generator=generator) < 0.1
                norm.weight[strong] = norm.weight[strong] * 12 + 3
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TEXT[:3]).logits


def distance(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def scaled_twin(model: Any, config: GPTQConfig) -> tuple[Any, list[scaling.Scaled]]:
    """Return a copy whose layers are scaled and nothing is rounded, and how."""
    trial = twin(model)
    chosen, _ = targets(Setting.of(model).anatomy, config)
    layers, reason = layers_of(trial, TEXT)
    assert not reason
    found = []
    with torch.no_grad(), Room(1 << 30, None) as room:
        stream = Stream(room, "{}", 0, len(TEXT), lambda row: first_inputs(trial, layers, TEXT[row : row + 1]))
        for layer, block in zip(layers, Anatomy.of(trial).blocks, strict=True):
            products = [p for target in within(chosen, layer.path) for p in products_of(trial, target, config)]
            following = stream.room_for_next()
            for row in range(len(following)):
                following.write(row, layer.run(stream.read.row(row)))
            found.append(scaling.scale(layer, block, products, stream.read, trial, model.dtype))
            stream.go_on(following)
    return trial, found


@pytest.mark.parametrize("name", DESCRIBED)
def test_scaled_and_not_rounded_it_is_the_same_function(name: str) -> None:
    model = uneven(name)
    before = fingerprint(model)
    trial, found = scaled_twin(model, AWQ)
    has_experts = name in MIXTURES
    places = 4 if model.config.num_attention_heads == model.config.num_key_value_heads else 3
    assert all(len(layer.alphas) == (places - 2 if has_experts else places) for layer in found)
    assert sum(alpha is not None for layer in found for alpha in layer.alphas) >= len(found) + (not has_experts)
    experts = ["where a router and experts read what the norm gives"]
    assert all(layer.reasons == (experts if has_experts else []) for layer in found)
    ours = dict(trial.named_parameters())
    kept = [torch.equal(ours[path], value) for path, value in model.named_parameters() if path in ours]
    assert kept.count(False) > len(found)
    assert distance(logits(trial), logits(model)) < 2e-5
    assert not changes(before, fingerprint(model)), "the copy's tensors are replaced, and not written to"


def test_heads_that_are_as_many_are_scaled_too() -> None:
    """Values go to the last product of attention channel by channel, their biases with them."""
    model = uneven("qwen2", heads=4)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight[::7] *= 9
    trial, found = scaled_twin(model, AWQ)
    assert all(len(layer.alphas) == 4 and layer.alphas[1] is not None for layer in found)
    assert distance(trial.model.layers[0].self_attn.v_proj.bias, model.model.layers[0].self_attn.v_proj.bias) > 0.1
    assert distance(logits(trial), logits(model)) < 2e-5


def textbook(model: Any, config: GPTQConfig) -> tuple[float, Tensor]:
    """Return the exponent, and the error of each, of layer 0's MLP, with loops and in double precision."""
    layer = model.model.layers[0]
    mlp, read = layer.mlp, []
    hook = mlp.register_forward_pre_hook(lambda module, args: read.append(args[0].double()))
    rows = torch.linspace(0, len(TEXT) - 1, 8).round().long()
    with torch.no_grad():
        model(TEXT[rows])
    hook.remove()
    x = read[0].flatten(0, 1)
    weights = [mlp.gate_proj.weight.detach().double(), mlp.up_proj.weight.detach().double()]
    down = mlp.down_proj.weight.detach().double()
    scheme = config.scheme(config.bits, x.shape[1])[0]
    group = scheme.columns_per_scale(x.shape[1])

    def output(gate: Tensor, up: Tensor) -> Tensor:
        return (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    relative = torch.zeros(x.shape[1], dtype=torch.float64)
    for column in range(x.shape[1]):
        start = column // group * group
        parts = [w[:, column].abs() / w[:, start : start + group].abs().amax(1) for w in weights]
        relative[column] = torch.cat(parts).mean()
    errors = []
    for step in range(20):
        alpha = step / 20
        s = x.abs().mean(0) ** alpha / (relative ** (1 - alpha) + 1e-4)
        s = s.clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        rounded = [dequantize(quantize((w * s).float(), scheme, torch.bfloat16)).double() / s for w in weights]
        errors.append((output(*rounded) - output(*weights)).square().sum())
    return int(torch.stack(errors).argmin()) / 20, torch.stack(errors)


def test_exponents_are_those_of_a_textbook() -> None:
    model = uneven("mistral")
    _, found = scaled_twin(model, AWQ)
    alpha, errors = textbook(model, AWQ)
    assert errors.max() > 1.2 * errors.min(), "exponents matter here"
    assert found[0].alphas[1] == pytest.approx(alpha)


@pytest.mark.parametrize("config", [AWQ, BOTH], ids=["nearest", "gptq"])
def test_it_loses_less_and_everything_comes_back(config: GPTQConfig) -> None:
    model = uneven("llama")
    stock, before = logits(model), fingerprint(model)
    norm = model.model.layers[0].input_layernorm
    fired: list[int] = []
    hook = norm.register_forward_hook(lambda *_: fired.append(1))
    hf_accel.optimize(model, GPTQConfig(bits=3, group_size=32, head=None), calibration=TEXT)
    without, unscaled = distance(logits(model), stock), hf_accel.report(model).gptq.findings
    if config is AWQ:
        hf_accel.restore(model)
        hf_accel.optimize(model, hf_accel.WeightOnlyConfig(bits=3, group_size=32, head=None), calibration=TEXT)
        without = distance(logits(model), stock)
    hf_accel.restore(model)
    hf_accel.optimize(model, config, calibration=TEXT)
    assert distance(logits(model), stock) < (0.9 if config is AWQ else 1.1) * without
    assert model.model.layers[0].input_layernorm is not norm
    for one, two in zip(hf_accel.report(model).gptq.findings, unscaled, strict=True):
        if "up_proj" not in one.path:  # its outputs are scaled, too
            assert one.error_of_rounding == pytest.approx(two.error_of_rounding, rel=1e-4), "of what was, in either way"
    fired.clear()
    logits(model)
    assert fired, "a hook of the user's stays at its norm"
    assert "scaled by what is read: " in str(hf_accel.report(model).gptq)
    hf_accel.restore(model)
    assert model.model.layers[0].input_layernorm is norm
    hook.remove()
    assert torch.equal(logits(model), stock)
    assert not changes(before, fingerprint(model))


def test_with_refining_and_saved(tmp_path: Path) -> None:
    model = uneven("qwen2")
    config = GPTQConfig(bits=4, group_size=32, scaling="awq", refine_steps=3)
    hf_accel.optimize(model, config, calibration=TEXT, originals="drop")
    hf_accel.save_pretrained(model, tmp_path)
    assert torch.equal(logits(hf_accel.from_pretrained(tmp_path)), logits(model))


def test_a_run_that_is_interrupted_ends_with_the_same_bits(tmp_path: Path) -> None:
    def run(folder: Path | None, progress: Any = None) -> tuple[dict[str, Tensor], Tensor]:
        model = uneven("llama")
        config = GPTQConfig(bits=2, group_size=32, scaling="awq", folder=None if folder is None else str(folder))
        hf_accel.optimize(model, config, calibration=TEXT, progress=progress)
        return state(model), logits(model)

    whole, expected = run(None)
    with pytest.raises(Killed):
        run(tmp_path, killing(25))
    assert (tmp_path / "layer-0.safetensors").exists()
    resumed, found = run(tmp_path)
    assert same(whole, resumed)
    assert torch.equal(found, expected), "norms are as in the whole run, too"


def test_what_was_made_is_put_in_place_again_with_its_norms() -> None:
    model = uneven("gemma2")
    setting = Setting.of(model)
    setting.calibration = CalibrationText(TEXT, "random tokens", False)
    setting.keep_prepared()
    found = []
    for _ in range(2):
        with applied(Plan.of([BOTH]), setting):
            found.append((logits(model), model.model.layers[0].input_layernorm))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] is found[1][1] is not model.model.layers[0].input_layernorm


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
def test_half_precision(name: str) -> None:
    """Norms are rounded to their data type, and the columns make up for that."""
    model = uneven(name).to(torch.bfloat16)
    trial, found = scaled_twin(model, AWQ)
    assert any(alpha is not None for layer in found for alpha in layer.alphas)
    exact, moved = logits(model.float()), copy.deepcopy(model).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in {
            part.module.weight for b in Anatomy.of(moved).blocks for part in (b.q, b.k, b.v, b.o, b.gate, b.up, b.down)
        }:
            weight.mul_(1 + (torch.rand(weight.shape, generator=generator) - 0.5) * 2**-8)
    rounding = distance(logits(moved), exact)
    assert distance(logits(trial.float()), exact) < 2.5 * rounding, "weights are rounded once or twice, and no more"


def test_a_layer_that_computes_something_else_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling.Place, "divided", lambda self, scales: (self.source.weight.detach(), scales))
    model = uneven("llama")
    trial, found = scaled_twin(model, AWQ)
    assert all(layer.reasons == ["where it computes something else when it is scaled"] for layer in found)
    assert torch.equal(logits(trial), logits(model))


def test_what_is_left_and_said() -> None:
    model = uneven("llama")
    config = GPTQConfig(bits=3, group_size=32, scaling="awq", head=None, layers={"*.0.mlp.up_proj": None})
    _, run = calibrated(model, config, TEXT)
    assert "not scaled where not all of its products are rounded: 2 places" in run.notes
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight = model.model.layers[0].input_layernorm.weight
    _, run = calibrated(model, BOTH, TEXT)
    assert "not scaled where weights are shared with another module: 2 places" in run.notes
    _, run = calibrated(build("gpt2"), BOTH, TEXT)
    assert "not scaled where a layer norm comes before: 4 places" in run.notes
    model = build(UNDESCRIBED)
    _, run = calibrated(model, BOTH, TEXT)
    missing = f"no decoder layer of this {type(model).__name__} is understood"
    assert any(missing in note for note in run.notes)
    with pytest.raises(UnsupportedModelError, match=f"there is nothing to scale: {missing}"):
        hf_accel.optimize(build(UNDESCRIBED), AWQ, calibration=TEXT)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"scaling": "smooth"}, "scaling is \"awq\" or None; 'smooth'"),
        ({"scaling": True}, "scaling is"),
        ({"solver": "rtn"}, 'solver is "gptq" or "nearest"'),
        ({"solver": "nearest"}, 'needs scaling="awq" or refine_steps'),
    ],
    ids=str,
)
def test_what_does_not_fit(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        GPTQConfig(**values)
