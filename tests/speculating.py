"""Models that speculate at every step, drafts that are wrong often enough, and calls whose outcome must be stock's."""

from __future__ import annotations

import functools
from typing import Any

import torch
from catalogue import exact
from comparison import Outcome, assert_same_outcome, run
from models import VOCABULARY, build, padded, prompt

import hf_accel
from hf_accel import SpeculativeConfig
from hf_accel.core.config import Config

NEW_TOKENS = 12
FEW_TOKENS = list(range(7, VOCABULARY))  # suppressed: of the rest everything comes again, so that lookup has its say
ENDS: dict[str, Any] = {"eos_token_id": list(range(20, 40)), "pad_token_id": 3}
# the first row goes round in a circle and the others never enter it: rows that advance at very different speeds
CIRCLE: dict[str, Any] = {"sequence_bias": [[[5], -50.0], [[6], -50.0], [[5, 6], 150.0], [[6, 5], 150.0]]}


@functools.cache
def noisy(name: str, share: float = 0.03, seed: int = 5) -> Any:
    """Return a stock model that agrees with `name` at about half of all tokens."""
    model = build(name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(share * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return model


def always(drafter: str | tuple[str, ...], **options: Any) -> SpeculativeConfig:
    """Return a config that drafts up to four tokens at every step, whatever that costs."""
    return SpeculativeConfig(**{"drafter": drafter, "bits": 4, "adaptive": False, "max_draft_tokens": 4, **options})


def speculating(name: str, drafter: str | tuple[str, ...], configs: list[Config] | None = None, **options: Any) -> Any:
    """Return a fresh model optimised by everything exact, or by `configs`, that drafts by `drafter`."""
    model = build(name)
    others = exact(model, SpeculativeConfig) if configs is None else configs
    return hf_accel.optimize(model, [*others, always(drafter, **options)], draft_model=noisy(name))


@functools.cache
def shared(name: str, drafter: str | tuple[str, ...]) -> Any:
    """Return a speculating model that tests share: calls must not disturb each other."""
    return speculating(name, drafter)


@functools.cache
def stock(name: str) -> Any:
    return build(name)


def counts(model: Any) -> dict[str, Any]:
    """Return what the report says of speculation."""
    return hf_accel.report(model).to_dict()["speculation"]  # type: ignore[no-any-return]


def total(found: dict[str, Any], kind: str) -> int:
    """Return all drafts "proposed" or "accepted"."""
    return sum(found[kind].values())


def ask(model: Any, rows: int = 1, seed: int = 3, **given: Any) -> Any:
    """Generate after one prompt of 6 tokens, or after left-padded ones of 9, 3, 5 and 7."""
    inputs = {"input_ids": prompt(1, 6, seed)} if rows == 1 else padded([9, 3, 5, 7][:rows], seed)
    return model.generate(**inputs, **{"max_new_tokens": NEW_TOKENS, "do_sample": False, **given})


@functools.cache
def _expected(name: str, frozen: tuple[tuple[str, str], ...], rows: int, seed: int) -> Outcome:
    return run(lambda model: ask(model, rows, seed, **_thawed[frozen]), stock(name), seed)


_thawed: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}


def assert_stock(model: Any, name: str, rows: int = 1, seed: int = 3, own: Any = None, **given: Any) -> Outcome:
    """Compare a call, with our keywords `own`, with stock's: the text, and where the random numbers then stand."""
    frozen = tuple(sorted((key, repr(value)) for key, value in given.items()))
    _thawed[frozen] = given
    expected = _expected(name, frozen, rows, seed)
    if expected.error is not None:
        raise AssertionError("the call fails on the stock model") from expected.error
    found = run(lambda model: ask(model, rows, seed, **given, **(own or {})), model, seed)
    if found.error is not None:
        raise AssertionError("the call fails under speculation only") from found.error
    assert_same_outcome(expected, found)
    return found
