"""Goals solve weights on text: the user's, or what the model writes, within a time that is estimated before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fingerprint import changes, fingerprint
from test_goals import demo, settled
from transformers import AutoTokenizer

import hf_accel
from hf_accel import GPTQConfig, UnsupportedModelError, WeightOnlyConfig
from hf_accel.assets import demo_path
from hf_accel.core.steps.setting import Setting
from hf_accel.measure.quality import CalibrationText, QualityReference
from hf_accel.planner import GOALS
from hf_accel.quantization import candidates, duration
from hf_accel.quantization.allocating.bounded import choose_bits
from hf_accel.quantization.calibrating.solving import Calibrator

__all__ = ["settled"]  # a fixture, by its name
pytestmark = pytest.mark.usefixtures("settled")


def text(tokens: int = 1280) -> torch.Tensor:
    words = AutoTokenizer.from_pretrained(demo_path())
    ids: torch.Tensor = words(Path(__file__).read_text(), return_tensors="pt")["input_ids"]
    return ids[:, :tokens].reshape(-1, 128)


def config_of(plan: hf_accel.Plan) -> WeightOnlyConfig:
    [config] = [step.config for step in plan.steps if isinstance(step.config, WeightOnlyConfig)]
    return config


def skips(plan: hf_accel.Plan) -> dict[str, str]:
    return {skip.what: skip.reason for skip in plan.skipped}


def test_weights_are_solved_on_one_part_of_a_text_and_measured_on_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[torch.Tensor] = []
    run = Calibrator.run

    def recorded(self: Calibrator) -> Any:
        read.append(self.ids)
        return run(self)

    monkeypatch.setattr(Calibrator, "run", recorded)
    model, ids = demo(), text()
    before = fingerprint(model)
    hf_accel.optimize(model, "fast", calibration=ids)
    found = hf_accel.report(model)
    assert found.applied[0].config == GPTQConfig(bits=4, group_size=64, head=8)
    assert len(read) == 1, "solved once, for trying and for good"
    assert torch.equal(read[0], ids[:8])
    assert found.quality.tokens == 2 * 127
    assert found.quality.perplexity_before is not None
    assert len(found.gptq.to_dict()["products"]) == 35
    hf_accel.restore(model)
    assert not changes(before, fingerprint(model))
    with hf_accel.optimized(model, WeightOnlyConfig(bits=4, group_size=64), calibration=ids[8:]):
        assert found.quality.kl < 0.8 * hf_accel.report(model).quality.kl


def test_the_model_writes_text_where_that_does_not_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "MOST_WRITING_S", 1e6)
    monkeypatch.setattr("hf_accel.quantization.calibrating.text.MOST_OWN_TOKENS", 512)
    plan = hf_accel.plan(demo(), "fast")
    assert isinstance(config_of(plan), GPTQConfig)
    assert plan.quality.source == "the model's own samples"
    assert "GPTQConfig" not in skips(plan)


def test_what_takes_too_long_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duration, "calibrating_seconds", lambda *arguments: 121.4)
    monkeypatch.setattr(Calibrator, "run", lambda self: pytest.fail("begun"))
    plan = hf_accel.plan(demo(), "fast", calibration=text())
    assert type(config_of(plan)) is WeightOnlyConfig
    reason = "solving weights on the text would take about 121 s, more than 120 s: weights are only rounded"
    assert skips(plan)["GPTQConfig"] == reason
    assert reason in str(plan)


def test_the_estimate_grows_with_text_and_products() -> None:
    setting = Setting.of(demo())
    setting.calibration = CalibrationText(text(), "code", False)
    few, many = (min(duration.calibrating_seconds(setting, GPTQConfig(), n) for _ in range(3)) for n in (1, 20))
    assert 0 < few < many < 20 * 60
    setting.calibration = CalibrationText(text().repeat(40, 1), "code", False)
    assert min(duration.calibrating_seconds(setting, GPTQConfig(), 1) for _ in range(3)) > 2 * few


@pytest.mark.parametrize(
    "owner, name, error, reason",
    [
        (Calibrator, "run", UnsupportedModelError("a product reads NaN"), "only rounded: a product reads NaN"),
        (duration, "calibrating_seconds", RuntimeError("odd"), "cannot be solved here (RuntimeError: odd)"),
    ],
)
def test_weights_are_rounded_where_solving_fails(
    owner: Any, name: str, error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> Any:
        raise error

    monkeypatch.setattr(owner, name, fails)
    plan = hf_accel.plan(demo(), "fast", calibration=text())
    assert type(config_of(plan)) is WeightOnlyConfig
    assert reason in skips(plan)["GPTQConfig"]


def test_mixed_bits_are_not_solved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    run = Calibrator.run
    monkeypatch.setattr(Calibrator, "run", lambda self: (runs.append(1), run(self))[1])
    model, ids = demo(), text(640)
    setting = Setting.of(model)
    setting.keep_prepared()
    setting.calibration = CalibrationText(ids[:4], "code", False)
    reference = QualityReference(model, CalibrationText(ids[4:], "code", False))
    loose = choose_bits(setting, replace(GOALS["fast"], max_kl=10.0), reference, is_calibrated=True)
    assert len(runs) == 1
    bound = loose.quality.kl / 3
    found = choose_bits(setting, replace(GOALS["fast"], max_kl=bound), reference, is_calibrated=True)
    assert isinstance(found.config, GPTQConfig)
    assert found.config.layers, "bits differ from layer to layer"
    assert found.quality.kl <= bound
    assert len(runs) == 3, "groups of 64 and of 32, and 8 bits"


def test_short_text_is_measured_on_as_a_whole() -> None:
    plan = hf_accel.plan(demo(), "fast", calibration=text(512))
    assert type(config_of(plan)) is WeightOnlyConfig
    assert plan.quality.tokens == 4 * 127
