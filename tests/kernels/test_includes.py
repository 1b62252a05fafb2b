"""How the C sources of the native library name one another, and that all of them are built and packed."""

from __future__ import annotations

import re
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

from hf_accel.kernels import native

ROOT = Path(__file__).parents[2]
CSRC = Path(native.__file__).parent / "csrc"
FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".c", ".h"))


def name_of(path: Path) -> str:
    return path.relative_to(CSRC).as_posix()


def included_by(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include "(.+)"', path.read_text(), re.MULTILINE)


def test_includes_name_files_by_their_path_from_csrc() -> None:
    names = {name_of(path) for path in FILES}
    wrong = [(name_of(path), found) for path in FILES for found in included_by(path) if found not in names]
    assert FILES
    assert not wrong
    headers = {name for name in names if name.endswith(".h")}
    assert {found for path in FILES for found in included_by(path)} == headers


def test_no_file_includes_itself_by_way_of_others() -> None:
    """A source file and the header of its name count as one."""
    graph: dict[str, set[str]] = {}
    for path in FILES:
        unit = name_of(path.with_suffix(""))
        graph.setdefault(unit, set()).update(name.removesuffix(".h") for name in included_by(path))
        graph[unit].discard(unit)
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_every_file_is_built_or_watched_by_the_build() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"][0]
    folder = "hf_accel/kernels/native/csrc"
    assert build["sources"] == sorted(f"{folder}/{name_of(path)}" for path in FILES if path.suffix == ".c")
    assert build["depends"] == sorted(f"{folder}/{name_of(path)}" for path in FILES if path.suffix == ".h")
