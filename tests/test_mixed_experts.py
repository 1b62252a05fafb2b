"""Bits of each expert: what its rounding costs by definition, what the router sends it, and a model that has them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from heads import model_of
from mixtures import MIXTURES
from models import padded, prompt
from packed_experts import PARTS, experts_of, put_rows, rows_of
from torch import Tensor

import hf_accel
from hf_accel import ConfigError, GPTQConfig, MixedPrecisionConfig, WeightOnlyConfig
from hf_accel.core.model.anatomy import Anatomy
from hf_accel.core.model.shadow import twin
from hf_accel.core.steps.patcher import Patcher
from hf_accel.core.steps.setting import Setting
from hf_accel.measure.quality import CalibrationText
from hf_accel.ops.affine import Scheme, dequantize, quantize
from hf_accel.quantization.allocating.groups import Group, groups_of
from hf_accel.quantization.allocating.sensitivity import Sensitivity
from hf_accel.quantization.targets import targets

TEXT = prompt(6, 48)
TOGETHER = MixedPrecisionConfig(average_bits=9, method="nearest", head=None)
APART = MixedPrecisionConfig(average_bits=9, method="nearest", head=None, experts="apart")


def wide(name: str) -> Any:
    """A mixture whose experts have rows that groups of columns divide."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32}
    tiny = MIXTURES[name]
    config = {key: sizes.get(key, value) for key, value in tiny.config.items()}
    return model_of(replace(tiny, config=config))


def grouped(model: Any, config: MixedPrecisionConfig) -> list[Group]:
    setting = Setting.of(model)
    return groups_of(targets(setting.anatomy, config.of_products((("*", 8),)))[0], config, model.dtype)


def measured(model: Any, config: MixedPrecisionConfig, bits: float) -> list[Group]:
    text = CalibrationText(TEXT, "random", False)
    return Sensitivity(twin(model), text, grouped(model, config), config, bits, model.dtype).measured()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**padded([9, 20])).logits


def test_groups_of_experts_apart_are_parts_of_those_together() -> None:
    model = wide("mixtral")
    whole = {group.name: group for group in grouped(model, TOGETHER)}
    apart = grouped(model, APART)
    path = "model.layers.1.mlp.experts"
    own = [group for group in apart if group.name.startswith(path)]
    assert [group.name for group in own] == [f"{path}.{i}" for i in range(4)]
    assert own[2].paths == [f"{path}.gate_up_proj.2", f"{path}.down_proj.2"]
    assert sum(group.weights for group in own) == whole[path].weights == 4 * 3 * 64 * 64
    assert sum(group.original_bytes for group in own) == whole[path].original_bytes
    for index, option in enumerate(own[0].options):
        assert option.bits != 16
        assert 4 * option.nbytes == whole[path].options[index].nbytes
    assert [group.name for group in apart if ".experts" not in group.name] == [n for n in whole if ".experts" not in n]


def textbook(model: Any, path: str, scheme: Scheme) -> tuple[list[float], list[int]]:
    """The squared error of each expert in the module's output over all tokens of the text, and its tokens."""
    experts, given = model.get_submodule(path), []
    hook = experts.register_forward_pre_hook(lambda module, args: given.append(args))
    with torch.no_grad():
        for row in TEXT:
            model(row[None], use_cache=False)
    hook.remove()
    hidden, ids, weights = (torch.cat(parts) for parts in zip(*given))
    errors, tokens = [], []
    experts.config._experts_implementation = "eager"
    for expert in range(experts.num_experts):
        kept = {name: getattr(experts, name).detach().clone() for name in PARTS}
        alone = torch.where(ids == expert, ids, experts.num_experts - 1 if expert == 0 else 0)
        by = torch.where(ids == expert, weights, 0.0)
        with torch.no_grad():
            before = experts(hidden, alone, by)
            for name in PARTS:
                put_rows(
                    experts, name, expert, dequantize(quantize(rows_of(experts, name, expert), scheme, torch.bfloat16))
                )
            errors.append(float((experts(hidden, alone, by) - before).double().square().sum()))
            for name, value in kept.items():
                getattr(experts, name).data.copy_(value)
        tokens.append(int((ids == expert).sum()))
    return errors, tokens


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral"])
def test_the_cost_of_an_expert_is_its_part_in_the_error_of_the_layer(name: str) -> None:
    model = wide(name)
    path = next(reversed(experts_of(model)))
    apart, together = (replace(config, choices=(3, 4), group_size=32) for config in (APART, TOGETHER))
    found = [group for group in measured(model, apart, 4.5) if group.name.startswith(f"{path}.")]
    [whole] = [group for group in measured(model, together, 4.5) if group.name == path]
    three, four = 0, 1
    assert [option.bits for option in found[0].options] == [3, 4]
    assert sum(group.options[four].kl for group in found) == pytest.approx(whole.options[four].kl, rel=1e-3)
    errors, tokens = textbook(model, path, Scheme(4, 32))
    mean = sum(errors) / sum(tokens)
    shares = [(error + mean) for error in errors]
    for group, share in zip(found, shares, strict=True):
        kl = sum(shares) * group.options[four].kl / sum(g.options[four].kl for g in found)
        assert kl == pytest.approx(share, rel=1e-3)
    coarse, _ = textbook(model, path, Scheme(3, 32))
    for group, (error, finer) in zip(found, zip(coarse, errors)):
        if finer:
            ratio = (error + sum(coarse) / sum(tokens)) / (finer + mean)
            assert group.options[three].kl / group.options[four].kl == pytest.approx(ratio, rel=1e-3)


@pytest.mark.parametrize("whole", [False, True])
def test_experts_that_cost_more_have_more_bits(whole: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if whole:
        path = "hf_accel.quantization.allocating.sensitivity.layers_of"
        monkeypatch.setattr(path, lambda model, ids: ([], "a reason"))
    model = wide("mixtral")
    for experts in experts_of(model).values():
        experts.down_proj.data *= torch.tensor([0.05, 1.0, 1.0, 5.0])[:, None, None]
    config = MixedPrecisionConfig(average_bits=4.5, method="nearest", head=None, experts="apart", choices=(2, 3, 4, 8))
    patcher = Patcher.for_config(config)
    foretold = patcher.weight_bytes(Setting.of(model))
    hf_accel.optimize(model, config, calibration=TEXT, originals="drop")
    section = hf_accel.report(model).sections["mixed_precision"]
    assert 4.3 < section.average_bits <= 4.5
    assert 0.95 * foretold < Anatomy.of(model).weight_bytes <= foretold
    bits = {path: [p.scheme.bits for p in experts.gate_up_proj] for path, experts in experts_of(model).items()}
    for path, experts in experts_of(model).items():
        assert bits[path] == [p.scheme.bits for p in experts.down_proj]
        assert bits[path][0] <= min(bits[path][1:3]) <= max(bits[path][1:3]) < bits[path][3]
    expected = logits(model)
    hf_accel.save_pretrained(model, tmp_path)
    again = hf_accel.from_pretrained(tmp_path)
    assert torch.equal(logits(again), expected)
    assert bits == {path: [p.scheme.bits for p in e.gate_up_proj] for path, e in experts_of(again).items()}


def test_patterns_may_speak_of_an_expert_s_products() -> None:
    path = "model.layers.0.mlp.experts"
    layers = {f"{path}.down_proj.2": 8, "*.experts.down_proj.*": (2, 32), "*.0.mlp.experts": 3, "*": 4}
    config = WeightOnlyConfig(layers=layers, group_size=32, head=None)
    model = hf_accel.optimize(wide("gpt_oss"), config)
    first, second = experts_of(model).values()
    assert [p.scheme for p in first.down_proj] == [Scheme(2, 32), Scheme(2, 32), Scheme(8), Scheme(2, 32)]
    assert {p.scheme for p in first.gate_up_proj} == {Scheme(3, 32)}
    assert {p.scheme for p in second.gate_up_proj} == {Scheme(4, 32)}
    assert {p.scheme for p in second.down_proj} == {Scheme(2, 32)}
    for layers, reason in (
        ({f"{path}.down_proj.2": None}, "cannot stay as it is where others"),
        ({f"{path}.down_proj.4": 8}, "matches no module of the model"),
    ):
        with pytest.raises(hf_accel.UnsupportedModelError, match=reason):
            hf_accel.optimize(wide("gpt_oss"), WeightOnlyConfig(layers=layers))
    left = hf_accel.optimize(wide("gpt_oss"), WeightOnlyConfig(layers={"*.0.mlp.experts": None, "*.down_proj.0": 8}))
    assert [type(experts).__name__ for experts in experts_of(left).values()] == ["GptOssExperts", "QuantizedExperts"]
    with pytest.raises(ConfigError, match='is "together" or "apart"'):
        MixedPrecisionConfig(average_bits=4, experts="alone")


def tokens_of(model: Any, text: Tensor) -> dict[str, int]:
    """Return path of a product -> tokens of the text that its expert is sent."""
    found: dict[str, int] = {}

    def count(path: str, module: Any, args: Any) -> None:
        for expert, tokens in enumerate(args[1].flatten().bincount(minlength=module.num_experts).tolist()):
            for part in PARTS:
                name = f"{path}.{part}.{expert}"
                found[name] = found.get(name, 0) + tokens

    for path, experts in experts_of(model).items():
        experts.register_forward_pre_hook(partial(count, path))
    with torch.no_grad():
        for row in text:
            model(row[None], use_cache=False)
    return found


def test_experts_that_read_too_little_are_rounded_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every layout, those and no others: what they read is counted token by token."""
    for name in ["gpt_oss", "mixtral"]:
        tokens = tokens_of(wide(name), TEXT[:5])  # one row is held back
        least = sorted(tokens.values())[3] + 1
        monkeypatch.setattr("hf_accel.quantization.calibrating.solving.LEAST_TOKENS", least)
        monkeypatch.setattr("hf_accel.quantization.calibrating.findings.MOST_FALLBACKS", 1.0)
        plain, solved = (
            hf_accel.optimize(wide(name), config, calibration=TEXT)
            for config in (WeightOnlyConfig(group_size=32), GPTQConfig(group_size=32))
        )
        findings = {finding.path: finding for finding in hf_accel.report(solved).sections["gptq"].findings}
        for path, count in tokens.items():
            assert findings[path].tokens == count
            assert bool(findings[path].reason) == (count < least)
            one, other = (tree.get_submodule(path).codes for tree in (plain, solved))
            assert torch.equal(one, other) == (count < least)
