"""Bits where they matter: the best choice within a budget, what it is based on, and a model that has it."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from fingerprint import changes, fingerprint
from models import NAMES, build, padded, prompt
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_accel
from hf_accel import ConfigError, GPTQConfig, MixedPrecisionConfig, UnsupportedModelError, WeightOnlyConfig
from hf_accel.assets import demo_path
from hf_accel.core.config import Config
from hf_accel.core.model.anatomy import SIBLING_NAMES, Anatomy
from hf_accel.core.model.shadow import twin
from hf_accel.core.steps.patcher import Patcher
from hf_accel.core.steps.setting import Setting
from hf_accel.measure.quality import CalibrationText, QualityReference
from hf_accel.ops.affine import Scheme, dequantize, quantize
from hf_accel.quantization.allocating.allocation import Option, allocate
from hf_accel.quantization.allocating.groups import Group, groups_of
from hf_accel.quantization.allocating.sensitivity import Sensitivity
from hf_accel.quantization.modules.linear import QuantizedLinear
from hf_accel.quantization.targets import targets

TEXT = prompt(6, 48)
NEAREST = MixedPrecisionConfig(average_bits=16, method="nearest", head=None)


def grouped(model: Any, config: MixedPrecisionConfig = NEAREST) -> list[Group]:
    setting = Setting.of(model)
    return groups_of(targets(setting.anatomy, config.of_products((("*", 8),)))[0], config, model.dtype)


def options(draw: random.Random) -> list[Option]:
    kls = sorted((draw.random() for _ in range(4)), reverse=True)
    return [Option(bits, None, bits * draw.choice((10, 11, 17)), kl) for bits, kl in zip((2, 3, 4, 8), kls)]


def test_the_best_of_all_choices_is_found() -> None:
    """The twin tries every choice there is."""
    draw = random.Random(1)
    for _ in range(40):
        groups = [options(draw) for _ in range(5)]
        budget = draw.randrange(sum(min(o.nbytes for o in group) for group in groups), 420)
        every = [[group[i] for group, i in zip(groups, c)] for c in itertools.product(range(4), repeat=5)]
        best = min(sum(o.kl for o in some) for some in every if sum(o.nbytes for o in some) <= budget)
        for most_sums in (1 << 18, 0):
            chosen = [group[i] for group, i in zip(groups, allocate(groups, budget, most_sums))]
            assert sum(o.nbytes for o in chosen) <= budget
            found = sum(o.kl for o in chosen)
            if most_sums:
                assert found == pytest.approx(best)
            else:  # by prices it may miss what one step of one group gains
                step = max(abs(a.kl - b.kl) for group in groups for a, b in itertools.pairwise(group))
                assert best - 1e-12 <= found <= best + step
    with pytest.raises(ValueError, match="more than 3"):
        allocate([options(draw)], 3)


def test_prices_come_close_where_there_are_many_groups() -> None:
    draw = random.Random(2)
    groups = [options(draw) for _ in range(200)]
    exact, priced = (allocate(groups, 12_000, most_sums) for most_sums in (1 << 18, 0))
    costs = [sum(group[i].kl for group, i in zip(groups, chosen)) for chosen in (exact, priced)]
    assert costs[0] <= costs[1] <= 1.01 * costs[0]
    assert sum(group[i].nbytes for group, i in zip(groups, priced)) <= 12_000


@pytest.mark.parametrize("name", NAMES)
def test_products_that_run_together_are_one_group(name: str) -> None:
    model = build(name)
    groups = grouped(model)
    paths = [target.path for group in groups for target in group.targets]
    chosen = targets(Anatomy.of(model), NEAREST.of_products((("*", 8),)))[0]
    assert sorted(paths) == sorted(target.path for target in chosen)
    home = {target.path: group.name for group in groups for target in group.targets}
    for siblings in SIBLING_NAMES:
        for path in paths:
            parent, _, last = path.rpartition(".")
            if last in siblings:
                assert len({home[f"{parent}.{other}"] for other in siblings if f"{parent}.{other}" in home}) == 1
    assert len({group.name for group in groups}) == len(groups) > 1
    for index in (0, -1):  # bytes are those of the packed weights
        picks = [(target.path, group.options[index]) for group in groups for target in group.targets]
        pairs = tuple((path, (o.bits, o.group_size) if o.group_size else o.bits) for path, o in picks if o.bits < 16)
        config = WeightOnlyConfig(bits=8, head=None, layers=(*pairs, ("*", None)))
        after = Patcher.for_config(config).weight_bytes(Setting.of(model)) if pairs else Anatomy.of(model).weight_bytes
        before = sum(group.original_bytes for group in groups)
        picked = sum(group.options[index].nbytes for group in groups)
        assert after == Anatomy.of(model).weight_bytes - before + picked


def test_experts_of_a_layer_are_one_group() -> None:
    [group] = [group for group in grouped(build("mixtral")) if group.name.endswith("layers.0.mlp.experts")]
    assert len(group.targets) == 1


@pytest.mark.parametrize("whole", [False, True])
def test_the_cost_of_a_group_is_the_divergence_with_it_alone(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin puts a group's rounded weights into a copy of the model, and compares all of its distributions."""
    if whole:
        path = "hf_accel.quantization.allocating.sensitivity.layers_of"
        monkeypatch.setattr(path, lambda model, ids: ([], "a reason"))
    model = build("llama")
    before = fingerprint(model)
    text = CalibrationText(TEXT, "random", False)
    groups = grouped(model)
    run = Sensitivity(twin(model), text, groups, NEAREST, 10.0, model.dtype)
    found = run.measured()
    assert run.notes == (["the model was read as a whole: a reason"] if whole else [])
    assert run.tokens == 6 * 47
    assert [group.name for group in found] == [group.name for group in groups]
    assert not changes(before, fingerprint(model))
    for group in found[2], found[-1], found[5]:
        trial = build("llama")
        reference = QualityReference(trial, text)
        for target in group.targets:
            linear = trial.get_submodule(target.path)
            linear.weight.data = dequantize(quantize(linear.weight.detach(), Scheme(8), model.dtype))
        [eight] = [option for option in group.options if option.bits == 8]
        assert eight.kl == pytest.approx(reference.compare().kl, rel=0.02)
        assert next(option for option in group.options if option.bits == 16).kl == 0


def test_the_costs_of_other_widths_follow_from_their_errors() -> None:
    """The twin measures each width by itself."""
    model = demo()
    ids = words("def f(a, b):\n    return [a * b for a in range(b)]\n" * 40)[:, :512].view(4, 128)
    config = MixedPrecisionConfig(average_bits=4.25, choices=(3, 4, 8), group_size=64, head=None)
    text = CalibrationText(ids, "code", False)
    groups = [group for group in grouped(model, config) if ".layers.2." in group.name]
    near = [Sensitivity(twin(model), text, groups, config, bits, model.dtype).measured() for bits in (3.25, 4.25)]
    for one, other in zip(*near, strict=True):
        for index in (0, 1):
            assert one.options[index].kl == pytest.approx(other.options[index].kl, rel=0.5), one.name
        assert one.options[0].kl > 2 * one.options[1].kl > 4 * one.options[2].kl > 0


def demo() -> Any:
    return AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32).eval()


def words(text: str) -> torch.Tensor:
    return AutoTokenizer.from_pretrained(demo_path())(text, return_tensors="pt")["input_ids"]


def test_a_model_gets_its_bits_and_loses_less_than_with_equal_bits() -> None:
    ids = words(Path(__file__).read_text())[0, :2048]
    ids = ids[: len(ids) // 128 * 128].view(-1, 128)
    held = QualityReference(demo(), CalibrationText(ids[1::2], "code", False))
    model = demo()
    before = fingerprint(model)
    config = MixedPrecisionConfig(average_bits=3.25, group_size=64, head=None)
    planned = hf_accel.plan(model, config)
    hf_accel.optimize(model, hf_accel.Plan.from_json(planned.to_json()), calibration=ids[::2])
    found = hf_accel.report(model)
    mixed = held.of(model).kl
    section: Any = found.mixed_precision
    assert section.average_bits <= 3.25
    assert found.patched_weight_bytes <= planned.weight_bytes <= 1.01 * found.patched_weight_bytes
    assert "bits/columns per scale" in str(found)
    rows = json.loads(json.dumps(found.to_dict()))["mixed_precision"]["groups"]
    assert {row["bits"] for row in rows} > {3}
    for group, row in zip(section.groups, rows, strict=True):
        made = [model.get_submodule(target.path) for target in group.targets]
        assert all(isinstance(module, QuantizedLinear) for module in made)
        assert {(m.scheme.bits, m.scheme.group_size) for m in made} == {(row["bits"], row["group_size"])}
        assert sum(module.nbytes for module in made) == row["bytes"]
    hf_accel.restore(model)
    assert not changes(before, fingerprint(model))
    uniform = GPTQConfig(bits=3, group_size=64, head=None)
    assert hf_accel.plan(model, uniform).weight_bytes >= 0.99 * planned.weight_bytes
    hf_accel.optimize(model, uniform, calibration=ids[::2])
    assert mixed < 0.95 * held.of(model).kl


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "phi3"])
def test_a_budget_of_bytes_is_kept_on_any_architecture(name: str) -> None:
    model = build(name)
    before, original = fingerprint(model), Anatomy.of(model).weight_bytes
    config = MixedPrecisionConfig(budget_bytes=original * 2 // 3, head=None)
    hf_accel.optimize(model, config, calibration=prompt(8, 64))
    assert 0.5 * config.budget_bytes < Anatomy.of(model).weight_bytes <= config.budget_bytes
    model.generate(**padded([4, 9]), max_new_tokens=4, do_sample=False)
    hf_accel.restore(model)
    assert not changes(before, fingerprint(model))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, "one of them; None and None"),
        ({"average_bits": 4, "budget_bytes": 9}, "one of them; 4 and 9"),
        ({"average_bits": 0}, r"a number in \(0, 32\]"),
        ({"average_bits": "4"}, r"a number in \(0, 32\]"),
        ({"budget_bytes": 1.5}, "whole number"),
        ({"average_bits": 4, "choices": (4, 5)}, r"some of \(2, 3, 4, 8, 16\)"),
        ({"average_bits": 4, "choices": ()}, "none was given"),
        ({"average_bits": 4, "choices": 4}, "some of"),
        ({"average_bits": 4, "group_size": 48}, "group_size is one of"),
        ({"average_bits": 4, "head": 3}, "head is 4, 8 or None"),
        ({"average_bits": 4, "method": "hqq"}, '"gptq" or "nearest"'),
        ({"average_bits": 4, "method": "nearest", "refine_steps": 4}, "refine_steps belong to"),
    ],
)
def test_values_that_do_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MixedPrecisionConfig(**fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"average_bits": 2}, r"average_bits=2 is below the least .*: 2\.2\d\d to 32\.000 bits per weight"),
        ({"average_bits": 9, "choices": (2, 4)}, r"average_bits=9 is above the most .*: 2\.2\d\d to 4\.5\d\d bits"),
        ({"budget_bytes": 9000}, r"budget_bytes=9,000 is below the least .*: [\d,]+ to [\d,]+ bytes, of which [\d,]+"),
        ({"budget_bytes": 10**12}, r"budget_bytes=1,000,000,000,000 is above the most"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(fields: dict[str, Any], message: str) -> None:
    model = demo()
    before = fingerprint(model)
    for verb in (hf_accel.plan, hf_accel.optimize):
        with pytest.raises(UnsupportedModelError, match=message):
            verb(model, MixedPrecisionConfig(**fields))
    assert not changes(before, fingerprint(model))


def test_choices_that_fit_no_row_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"no groups of columns divide.*Put 8 or 16"):
        hf_accel.plan(build("llama"), MixedPrecisionConfig(average_bits=4, choices=(2, 4)))


def test_a_product_has_a_group_size_of_its_own(tmp_path: Path) -> None:
    model = demo()
    config = WeightOnlyConfig(bits=4, group_size=64, layers={"*.o_proj": (4, 32), "*.down_proj": 8}, head=None)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    hf_accel.optimize(model, config)
    schemes = [model.get_submodule(f"model.layers.1.{name}").scheme for name in ("self_attn.o_proj", "mlp.down_proj")]
    assert schemes == [Scheme(4, 32), Scheme(8)]
    model.save_pretrained(tmp_path)
    again = hf_accel.from_pretrained(tmp_path)
    assert again.get_submodule("model.layers.1.self_attn.o_proj").scheme == Scheme(4, 32)
    assert torch.equal(again(TEXT[:1]).logits, model(TEXT[:1]).logits)
    for value in ((4, 48), (5, 64), (4, 64, 1), "4"):
        with pytest.raises(ConfigError, match="layers"):
            WeightOnlyConfig(layers={"*": value})  # type: ignore[dict-item]
