"""The house's rules hold, each shown to see a planted fault; and a family is one folder and three lines."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import house
import pytest

import hf_accel
from hf_accel.core.calls.keywords import KEYWORDS
from hf_accel.core.calls.report import SECTIONS
from hf_accel.core.steps.patcher import Patcher

PACKAGE = Path(hf_accel.__file__).parent
ROOT = PACKAGE.parent
SOURCES = house.sources_of(PACKAGE)
OF_CORE = {"tenant", "seed"}  # keywords that belong to a call and to no family


def family_words() -> set[str]:
    configs = {config.__name__ for config in Patcher.registry if config.__module__.startswith("hf_accel.")}
    return configs | (set(KEYWORDS) - OF_CORE) | set(SECTIONS) | {"hfaccel_grouped", "hfaccel_eager"}


def words_in_core(sources: house.Sources) -> list[str]:
    return house.words_in_core(sources, family_words())


RULES: dict[str, tuple[Callable[[house.Sources], list[str]], str, str]] = {
    # name: the rule, and where which line breaks it
    "upward": (house.upward_imports, "kernels/weights.py", "from hf_accel.core.config import Config"),
    "relative": (house.upward_imports, "core/config.py", "from . import drift"),
    "families": (house.upward_imports, "layers/audit.py", "from hf_accel.cache import KVCacheConfig"),
    "circles": (house.circles, "core/config.py", "from hf_accel.core.steps.plan import Plan"),
    "for type checkers": (
        house.circles,
        "core/calls/call.py",
        "if TYPE_CHECKING:\n    from hf_accel.core.calls.report import Report",
    ),
    "planner": (house.families_in_planner, "planner/goals.py", "from hf_accel.layers import NativeLinearConfig"),
    "list of families": (house.families_in_planner, "measure/bench.py", "from hf_accel import families\nfamilies"),
    "words": (words_in_core, "core/calls/hosting.py", 'KEYWORD = "speculative"'),
    "configs": (words_in_core, "core/steps/plan.py", 'NEEDS = "WeightOnlyConfig before all others"'),
    "sections": (words_in_core, "core/calls/report.py", "kv_cache = None"),
    "length": (house.long_files, "core/config.py", "\n" * 300),
    "median": (lambda sources: house.long_files(dict.fromkeys(map(str, range(500)), "\n" * 101) | sources), "", ""),
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_holds_and_sees_a_planted_fault(name: str) -> None:
    rule, path, line = RULES[name]
    if path:
        assert rule(SOURCES) == []
        assert rule(SOURCES | {path: SOURCES[path] + "\n" + line + "\n"})
    else:
        assert rule(SOURCES)


PATCHER = '''
"""A step that does nothing, for calls that ask how it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_accel.core.calls.hosting import Host, host_of
from hf_accel.core.calls.keywords import Keyword, register
from hf_accel.core.calls.report import SECTIONS
from hf_accel.core.config import Config
from hf_accel.core.steps.goal import Goal, Offer
from hf_accel.core.steps.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.core.steps.setting import Setting


@dataclass(frozen=True, kw_only=True)
class ExerciseConfig(Config):
    """Nothing, at some length."""


class Moods:
    """Counts the moods of calls."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        return {"seen": self.seen}

    def __str__(self) -> str:
        return ", ".join(self.seen) or "no moods yet"


class ExercisePatcher(Patcher[ExerciseConfig], config=ExerciseConfig):
    stage = Stage.COMPILATION
    fidelity = Fidelity.EXACT
    occupies = "exercise"

    @classmethod
    def candidates(cls, goal: Goal, setting: Setting) -> Offer:
        return Offer([ExerciseConfig()] if goal.name == "exact" else [])

    def obstacles(self, setting: Setting) -> list[str]:
        return []

    def patch(self, setting: Setting, host: Host) -> Change:
        host.report.sections["exercise"] = Moods()
        return Change("nothing is done")


def _mood(model: Any, value: Any, arguments: dict[str, Any]) -> str:
    host: Any = host_of(model)
    host.report.exercise.seen.append(value)
    return str(value)


register(Keyword("mood", _mood))
SECTIONS["exercise"] = "exercise"
'''
USE = """
import torch
import hf_accel
from models import build, prompt

model = build("llama")
expected = model.generate(prompt(), max_new_tokens=8, do_sample=False)
assert "ExerciseConfig" in str(hf_accel.plan(model)), "offered, and timed or kept"
hf_accel.optimize(model, hf_accel.ExerciseConfig())
assert torch.equal(model.generate(prompt(), max_new_tokens=8, do_sample=False, mood="calm"), expected)
report = hf_accel.report(model)
assert report.to_dict()["exercise"] == {"seen": ["calm"]} and "exercise: calm" in str(report)
hf_accel.restore(model)
assert not hasattr(model, "mood")
"""


def insert(path: Path, before: str, line: str) -> None:
    """Write a line before the first that contains `before`."""
    lines = path.read_text().splitlines()
    at = next(index for index, text in enumerate(lines) if before in text)
    path.write_text("\n".join([*lines[:at], line, *lines[at:]]) + "\n")


def test_a_family_is_one_folder_and_three_lines(tmp_path: Path) -> None:
    """A family with a config, a keyword, a report section and a candidate, added to a copy of the project."""
    for folder in ("hf_accel", "tests", "docs"):
        ignored = shutil.ignore_patterns("__pycache__", "walks", "kernels" if folder == "tests" else "")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "examples").mkdir()
    # its folder
    family = tmp_path / "hf_accel" / "exercise"
    family.mkdir()
    (family / "__init__.py").write_text(
        '"""An exercise."""\n\nfrom hf_accel.exercise.patcher import ExerciseConfig\n\n__all__ = ["ExerciseConfig"]\n'
    )
    (family / "patcher.py").write_text(PATCHER.lstrip())
    # one import, one line of the catalogue, one row
    insert(tmp_path / "hf_accel" / "families.py", "hf_accel.layers", "from hf_accel.exercise import ExerciseConfig")
    insert(tmp_path / "hf_accel" / "families.py", '"KVCacheConfig",', '    "ExerciseConfig",')
    insert(tmp_path / "tests" / "catalogue.py", "    hf_accel.DecodingConfig(),", "    hf_accel.ExerciseConfig(),")
    insert(
        tmp_path / "docs" / "configs.md",
        "| `DecodingConfig",
        "| `ExerciseConfig()` | a place | nothing | all models | nothing |",
    )
    (tmp_path / "use.py").write_text(USE)

    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{tmp_path / 'tests'}", "OMP_NUM_THREADS": "1"}
    pytest_arguments = ["-p", "no:xdist", "-o", "addopts=", "-q", "-x", "-k", "not one_folder_and_three_lines"]
    cases = ["tests/test_house.py", "tests/test_architecture.py"]
    for arguments in ([str(tmp_path / "use.py")], ["-m", "pytest", *pytest_arguments, *cases]):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
