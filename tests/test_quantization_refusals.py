"""Which models and configs few bits refuse, and what is left out of them by name."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fingerprint import changes, fingerprint
from models import build
from torch import nn

import hf_accel
from hf_accel import WeightOnlyConfig
from hf_accel.core.config import Config
from hf_accel.core.model.anatomy import holds_experts

FOUR = WeightOnlyConfig(bits=4, group_size=32)


def refused(model: Any, config: Config, match: str) -> None:
    before = fingerprint(model)
    with pytest.raises(hf_accel.UnsupportedModelError, match=match):
        hf_accel.optimize(model, config)
    assert not changes(before, fingerprint(model))


def test_models_that_are_refused_stay_as_they_are() -> None:
    refused(build("llama"), WeightOnlyConfig(layers={"*.q_porj": 8}), r"'\*.q_porj' matches no module")
    for value in (math.nan, math.inf):
        model = build("llama")
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 3] = value
        refused(model, FOUR, r"weight of model.layers.1.mlp.up_proj holds NaN or infinity")
        hf_accel.optimize(model, WeightOnlyConfig(layers={"*.1.mlp.up_proj": None}))
    refused(build("llama", torch.float64), FOUR, "float64 are not quantized")
    model = build("llama")
    model.hf_quantizer = SimpleNamespace()
    refused(model, FOUR, r"quantized already")
    model.config.quantization_config = {"quant_method": "gptq"}
    refused(model, FOUR, r"quantized already \(gptq\)")
    refused(copy.deepcopy(hf_accel.optimize(build("llama"), FOUR)), FOUR, r"quantized already \(hf_accel\)")
    refused(build("llama"), WeightOnlyConfig(layers={"*": None}, head=None), "no linear product")
    model = hf_accel.optimize(build("llama"), FOUR)
    with pytest.raises(hf_accel.ConflictError, match="optimised already"):
        hf_accel.optimize(model, FOUR)


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"bits": 5}, "bits is 2, 3, 4 or 8"),
        ({"bits": True}, "bits is 2, 3, 4 or 8"),
        ({"head": 2}, "head is 4, 8 or None"),
        ({"embeddings": 4}, "embeddings is 8 or None"),
        ({"embeddings": 8, "head": 4}, "contradicts"),
        ({"group_size": 48}, "group_size is one of"),
        ({"bits": 8, "symmetric": False}, "only with bits below 8"),
        ({"symmetric": 1}, "True or False"),
        ({"layers": {"*": 1}}, r"layers\['\*'\] is 2, 3, 4 or 8"),
        ({"layers": 7}, "name patterns"),
    ],
)
def test_configs_that_do_not_fit_are_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(hf_accel.ConfigError, match=match):
        WeightOnlyConfig(**arguments)


def test_config_survives_json() -> None:
    config = WeightOnlyConfig(bits=8, layers={"*q_proj": None, "*": 4}, head=None)
    again = Config.from_dict(config.to_dict())
    assert again == config
    assert hash(again) == hash(config)


@pytest.mark.parametrize("config", [hf_accel.NativeLinearConfig(), FOUR], ids=["products", "few bits"])
def test_convolutions_and_tables_are_no_experts(config: Any) -> None:
    """They have weights of three dimensions, too."""
    model = build("llama")
    model.model.layers[0].extra = nn.Conv1d(4, 4, 3)
    model.model.layers[1].places = nn.ParameterList([nn.Parameter(torch.zeros(1, 5, 4))])
    hf_accel.optimize(model, config)
    assert not [skip for skip in hf_accel.report(model).skipped if "expert" in skip.reason]
    assert sum(map(holds_experts, build("mixtral").modules())) == 2
