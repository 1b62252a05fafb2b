"""Configs and plans described by values of any type: a config, or a ConfigError, and nothing half made."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest

from hf_accel.core.config import Config
from hf_accel.core.steps.plan import Plan
from hf_accel.errors import ConfigError

VALUES: list[Any] = [
    None, True, False, 0, -1, 7, 2**1100, 1.5, float("inf"), "", "text",
    [], [1], ["text"], [["text"]], [["text", 4, 5]], [None], [{}], {}, {"a": 1}, {"a": {"b": 1}},
]  # fmt: skip
OURS = sorted(name for name, cls in Config.types.items() if cls.__module__.startswith("hf_accel."))
PLAN: dict[str, Any] = {
    "goal": "fast",
    "steps": [{"config": {"type": "WeightOnlyConfig", "bits": 8}, "gain": 1.5}],
    "skipped": [{"what": "KVCacheConfig", "reason": "it is slower"}],
    "weight_bytes": 1000,
}
PLACES: list[tuple[Any, ...]] = [
    (), ("goal",), ("steps",), ("steps", 0), ("steps", 0, "config"), ("steps", 0, "config", "type"),
    ("steps", 0, "config", "bits"), ("steps", 0, "gain"), ("skipped",), ("skipped", 0), ("skipped", 0, "what"),
    ("skipped", 0, "reason"), ("weight_bytes",), ("another",), ("steps", 0, "another"), ("skipped", 0, "another"),
]  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_fields_of_any_type(name: str) -> None:
    for field in dataclasses.fields(Config.types[name]):
        for value in VALUES:
            try:
                config = Config.from_dict({"type": name, field.name: value})
            except ConfigError:
                continue
            assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
            assert hash(config) is not None


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_plans_with_a_value_of_any_type(place: tuple[Any, ...]) -> None:
    for value in VALUES:
        described: Any = copy.deepcopy(PLAN)
        if place:
            owner = described
            for key in place[:-1]:
                owner = owner[key]
            owner[place[-1]] = value
        else:
            described = value
        try:
            plan = Plan.from_dict(described)
        except ConfigError:
            continue
        assert Plan.from_json(plan.to_json()).to_dict() == plan.to_dict()
        assert str(plan)
        assert place[-1:] != ("another",)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"steps":[{"config":' * 5_000, "", "[", "9" * 9_999, None, 5, b"\xff"]
)
def test_texts_that_are_no_plan(text: Any) -> None:
    with pytest.raises(ConfigError, match="plan"):
        Plan.from_json(text)
