"""Layers of the architectures of transformers run natively, with stock's text, as docs/architectures.md says."""

from __future__ import annotations

import warnings

import pytest
from architectures import CannotBuild
from native_layers import PAGE, Row, causal, rows, walked, with_rows

# post-norm; parallel with layer norms; fused and sequential; learned positions; experts and sinks; a hybrid
FEW = ["olmo2", "cohere", "gpt_neox", "gpt2", "gpt_oss", "jamba"]


@pytest.mark.native
@pytest.mark.parametrize("model_type", FEW)
def test_some_architectures_are_as_the_page_says(model_type: str) -> None:
    row, differences = walked(model_type)
    assert not differences
    assert row == rows(PAGE.read_text())[model_type]


def test_the_page_is_what_its_rows_make() -> None:
    page = PAGE.read_text()
    found = rows(page)
    assert with_rows(page, found) == page
    assert len(found) >= 60
    assert sum(row.whole > 0 for row in found.values()) >= 35
    assert all(row.reason for row in found.values() if row.own or not row.whole + row.half)


@pytest.mark.slow
@pytest.mark.native
def test_every_architecture_is_as_the_page_says() -> None:
    found: dict[str, Row] = {}
    wrong: dict[str, list[str]] = {}
    for model_type in causal():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[model_type], differences = walked(model_type)
        except CannotBuild:
            continue
        if differences:
            wrong[model_type] = differences
    assert not wrong
    assert len(found) >= 60
    assert sum(row.whole > 0 for row in found.values()) >= 35
    page = PAGE.read_text()
    assert with_rows(page, found) == page, "write it again: python tests/walks/native_layers.py"
