"""Set-up that takes long shows that it goes on, where somebody looks, and from two seconds on only."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from models import build
from rich.console import Console
from transformers.utils import logging as transformers_logging

import hf_accel
from hf_accel.core.progress import shown


@contextmanager
def bars(are_on: bool) -> Iterator[None]:
    """Turn transformers' bars on or off: the command line turns them off for its process, maybe that of tests."""
    were_on = transformers_logging.is_progress_bar_enabled()
    (transformers_logging.enable_progress_bar if are_on else transformers_logging.disable_progress_bar)()
    try:
        yield
    finally:
        (transformers_logging.enable_progress_bar if were_on else transformers_logging.disable_progress_bar)()


def written(silent_s: float, is_terminal: bool = True, are_on: bool = True) -> str:
    """Return what is written during a tenth of a second of work, where transformers' bars are on or off."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=is_terminal, width=80)
    with bars(are_on), shown("measuring", console, silent_s) as step:
        for _ in range(4):
            time.sleep(0.05)
            step()
    return file.getvalue()


def test_short_work_is_silent() -> None:
    assert not written(60.0)


def test_long_work_shows_how_far_it_is() -> None:
    text = written(0.01)
    assert "measuring, step" in text


def test_nothing_is_written_where_nobody_looks() -> None:
    assert not written(0.01, is_terminal=False)
    assert not written(0.01, are_on=False)


def test_optimising_moves_the_bar_of_the_caller() -> None:
    calls: list[None] = []
    hf_accel.optimize(build("llama"), progress=lambda: calls.append(None))
    assert len(calls) > 5


def test_optimising_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    @contextmanager
    def noted(description: str) -> Iterator[Callable[[], None]]:
        opened.append(description)
        yield lambda: None

    monkeypatch.setattr("hf_accel.api.shown", noted)
    hf_accel.optimize(build("llama"), [hf_accel.DecodingConfig()])
    hf_accel.plan(build("llama"), [hf_accel.DecodingConfig()])
    assert opened == ["optimising LlamaForCausalLM", "planning for LlamaForCausalLM"]
