"""Applying: everything is checked once, weights are read for it once, and stages after the first see what it made."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from catalogue import exact
from fingerprint import changes, fingerprint
from models import build, prompt

import hf_accel
from hf_accel.core.calls.hosting import Host
from hf_accel.core.config import Config
from hf_accel.core.steps.applying import applied
from hf_accel.core.steps.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.core.steps.plan import Plan
from hf_accel.core.steps.setting import Setting
from hf_accel.planner import timing
from hf_accel.quantization import patcher


def test_each_step_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    configs = exact(model)
    counts: Counter[str] = Counter()
    for config in configs:
        cls = Patcher.registry[type(config)]

        def counted(self: Any, setting: Setting, real: Any = cls.obstacles) -> list[str]:
            counts[type(self).__name__] += 1
            return real(self, setting)  # type: ignore[no-any-return]

        monkeypatch.setattr(cls, "obstacles", counted)
    hf_accel.optimize(model, configs)
    assert set(counts.values()) == {1}
    assert len(counts) == len(configs)


@pytest.mark.parametrize("goal", ["fast", hf_accel.WeightOnlyConfig()], ids=["goal", "config"])
def test_no_weight_is_read_for_checking_more_than_once(goal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BUDGET_S", 0.05)
    reads: Counter[int] = Counter()
    real = torch.Tensor.aminmax

    def counted(self: torch.Tensor, **options: Any) -> Any:
        if sys._getframe(1).f_globals["__name__"] == patcher.__name__:  # quantizing reads them, too
            reads[self.data_ptr()] += 1
        return real(self, **options)

    monkeypatch.setattr(torch.Tensor, "aminmax", counted)
    model = build("qwen2")
    hf_accel.optimize(model, goal, **({"max_kl": 100.0} if goal == "fast" else {}))
    assert max(reads.values()) == 1
    assert len(reads) == 7 * model.config.num_hidden_layers + 1


@dataclass(frozen=True, kw_only=True)
class FewerLayersConfig(Config):
    """A model without its last layer, for tests."""


class FewerLayersPatcher(Patcher[FewerLayersConfig], config=FewerLayersConfig):
    stage = Stage.ARCHITECTURE
    fidelity = Fidelity.LOSSY
    occupies = "layers"

    def obstacles(self, setting: Setting) -> list[str]:
        return []

    def patch(self, setting: Setting, host: Host) -> Change:
        inner = setting.model.model
        kept = torch.nn.ModuleList(list(inner.layers)[:-1])
        host.journal.swap_module(inner, "layers", kept)
        host.journal.set_attribute(setting.model.config, "num_hidden_layers", len(kept))
        return Change("the last layer is left out")


@pytest.fixture
def fewer_layers() -> Iterator[Config]:
    Patcher.registry[FewerLayersConfig] = FewerLayersPatcher
    yield FewerLayersConfig()
    del Patcher.registry[FewerLayersConfig]


del Patcher.registry[FewerLayersConfig]


@pytest.mark.native
def test_what_follows_a_change_of_architecture_sees_the_new_one(fewer_layers: Config) -> None:
    model = build("llama")
    before = fingerprint(model)
    hf_accel.optimize(model, [fewer_layers, *exact(model)])
    [summary] = [step.summary for step in hf_accel.report(model).applied if "decoder layers" in step.summary]
    assert summary.startswith("2 decoder layers")
    model.generate(prompt(), max_new_tokens=4, do_sample=False)
    hf_accel.restore(model)
    assert not changes(before, fingerprint(model))


def test_a_change_of_architecture_that_is_taken_back_is_described_anew(fewer_layers: Config) -> None:
    setting = Setting.of(build("llama"))
    with applied(Plan.of([fewer_layers]), setting):
        assert len(setting.anatomy.blocks) == 2
    assert len(setting.anatomy.blocks) == 3
