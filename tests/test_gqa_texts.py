"""Calibration text is cut so that there is something to fit to, something to decide by, and something to measure on."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from models import build

from hf_accel.errors import ConfigError
from hf_accel.gqa import GQAConfig
from hf_accel.gqa.converting import BATCH, kept_back, least_tokens
from hf_accel.gqa.heads import layers_of
from hf_accel.gqa.text import texts_for
from hf_accel.measure.quality import CalibrationText

CONFIG = GQAConfig(num_kv_heads=1)


@functools.cache
def model() -> Any:
    return build("llama")


def text(rows: int, tokens: int) -> CalibrationText:
    ids = torch.arange(rows * tokens).view(rows, tokens)
    return CalibrationText(ids, "the text given", False)


@pytest.mark.parametrize("rows, tokens", [(8, 256), (9, 200), (12, 64), (11, 64), (64, 100), (1, 2000), (2, 1024)])
def test_some_is_fitted_to_and_the_rest_is_other_text(rows: int, tokens: int) -> None:
    fitted, rest = texts_for(model(), CONFIG, text(rows, tokens))
    assert fitted is not None
    count, length = fitted.ids.shape
    assert count % BATCH == 0
    assert (count - kept_back(count) * BATCH) * length >= least_tokens(layers_of(model()), model().config)
    assert len(rest.ids) >= BATCH
    assert not set(fitted.ids.flatten().tolist()) & set(rest.ids.flatten().tolist())


@pytest.mark.parametrize("rows, tokens", [(8, 16), (3, 40), (1, 100)])
def test_too_little_is_refused(rows: int, tokens: int) -> None:
    with pytest.raises(ConfigError, match="Give more text"):
        texts_for(model(), CONFIG, text(rows, tokens))


@pytest.mark.parametrize("method", ["mean", "first"])
def test_methods_that_need_none_measure_on_all(method: str) -> None:
    given = text(1, 9)
    assert texts_for(model(), GQAConfig(num_kv_heads=1, method=method), given) == (None, given)
    own = GQAConfig(num_kv_heads=1, method=method, calibration=[[1, 2, 3]])
    assert texts_for(model(), own, given)[1].ids.tolist() == [[1, 2, 3]]
