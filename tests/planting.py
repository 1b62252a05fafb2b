"""Mistakes in the package, and for each the test of the default run that must turn red by it: what the suite can see.

A defect is planted by a function that patches the package. Its test runs with its own cases, one after the other, until
one of them fails; cases that are `slow` are left out, since the default run leaves them out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

Patch = pytest.MonkeyPatch
Defect = Callable[[Patch], None]
Test = Callable[..., Any]


def cases(test: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Yield the arguments of every case that the default run has of a parametrised test."""
    rows: list[list[dict[str, Any]]] = []
    for mark in getattr(test, "pytestmark", []):
        if mark.name != "parametrize":
            continue
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        rows.append([])
        for value in mark.args[1]:
            marks = getattr(value, "marks", ())
            if any(mark.name == "slow" for mark in marks):
                continue
            values = value.values if isinstance(value, type(pytest.param())) else (value,)
            values = values[0] if len(names) > 1 and len(values) == 1 else values
            rows[-1].append(dict(zip((name.strip() for name in names), values, strict=True)))
    for chosen in product(*rows):
        yield {name: value for row in chosen for name, value in row.items()}


def is_red(test: Callable[..., Any], **fixtures: Any) -> bool:
    """Return whether a case of the test fails; of `fixtures` and `monkeypatch` each test is given what it names."""
    signature = inspect.signature(test)
    for case in cases(test):
        with Patch.context() as patch:  # what a case patches is its own
            found = {**fixtures, "monkeypatch": patch}
            if "tmp_path" in signature.parameters:
                found["tmp_path"] = fixtures["tmp_path"]()
            arguments = case | {name: value for name, value in found.items() if name in signature.parameters}
            signature.bind(**arguments)  # an argument that is missing is a mistake of the table
            if _fails(test, arguments):
                return True
    return False


def _fails(test: Callable[..., Any], arguments: dict[str, Any]) -> bool:
    try:
        test(**arguments)
    except pytest.skip.Exception:
        return False
    except (Exception, pytest.fail.Exception):
        return True
    return False


def machine(machine: Any, examples: int = 30) -> Callable[[], None]:
    """Return the test that a state machine is, without the search for a short example."""
    short = settings(max_examples=examples, stateful_step_count=40, phases=[Phase.generate])
    return lambda: run_state_machine_as_test(machine, settings=short)


def result(owner: Any, name: str, change: Callable[[Any], Any]) -> Defect:
    """Return the defect that what a function or a method returns is changed."""

    def plant(patch: Patch) -> None:
        old = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, **options: change(old(*args, **options)))

    return plant


def instead(owner: Any, name: str, new: Any) -> Defect:
    """Return the defect that something else stands where a function, a method or a value stood."""
    return lambda patch: patch.setattr(owner, name, new)


def nothing(*args: Any, **options: Any) -> None:
    """Do nothing."""
