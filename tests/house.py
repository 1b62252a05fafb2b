"""The rules of the house as functions over sources, so that a test can plant a fault and see it found.

Sources are {path below the package, with slashes: text}. Each rule returns sentences on what breaks it.
"""

from __future__ import annotations

import ast
import functools
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

Sources = dict[str, str]
MOST_LINES, MEDIAN_LINES = 300, 100


def sources_of(package: Path) -> Sources:
    """Return all Python sources of a package."""
    return {str(path.relative_to(package)): path.read_text() for path in sorted(package.rglob("*.py"))}


def families_of(sources: Sources) -> set[str]:
    """Return the families, as their list names them."""
    return {name.split(".")[0] for name in imports_of(sources["families.py"])}


def floors_of(sources: Sources) -> list[set[str]]:
    """Return the floors: a file imports from its own place and from floors below."""
    return [
        {"ops", "errors", "assets"},
        {"kernels"},
        {"core"},
        {"measure"},
        families_of(sources),
        {"families"},
        {"planner"},
        {"api", "recipes"},
        {"loading"},
        {"replicas", "endpoint"},
        {"cli"},
        {"__init__"},
    ]


def place_of(path: str) -> str:
    """Return the folder or file below the package that a path belongs to."""
    return path.split("/")[0].removesuffix(".py")


def module_of(path: str) -> str:
    """Return the dotted name of a file, without the package's own."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@functools.cache
def imports_of(text: str) -> tuple[str, ...]:
    """Return what a file imports of the package, as dotted names without it; imports for type checkers count, too."""
    return tuple(_imports_of(text))


def _imports_of(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("hf_accel.") for name in names if name.startswith("hf_accel."))


@functools.cache
def has_relative_imports(text: str) -> bool:
    return any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(ast.parse(text)))


def targets_of(path: str, sources: Sources) -> set[str]:
    """Return the modules of the package that a file imports."""
    modules = {module_of(other) for other in sources}
    found = set()
    for name in imports_of(sources[path]):
        while name and name not in modules:
            name = name.rpartition(".")[0]
        if name and name != module_of(path):
            found.add(name)
    return found


def upward_imports(sources: Sources) -> list[str]:
    """Return imports that do not go down, or from family to family."""
    families = families_of(sources)
    floor = {place: number for number, places in enumerate(floors_of(sources)) for place in places}
    found = [f"{path}: {place_of(path)} is on no floor" for path in sources if place_of(path) not in floor]
    found += [f"{path}: write absolute imports" for path in sources if has_relative_imports(sources[path])]
    for path in sources:
        own = place_of(path)
        for name in imports_of(sources[path]):
            other = name.split(".")[0]
            if other in floor and other != own and floor[other] >= floor.get(own, 0):
                kind = "families never import each other" if {own, other} <= families else "imports go down"
                found.append(f"{path} imports {name}: {kind}")
    return found


def circles(sources: Sources) -> list[str]:
    """Return circles of files that import one another; a package's own __init__ only hands names on."""
    graph = {module_of(path): targets_of(path, sources) for path in sources if not path.endswith("__init__.py")}
    found, done = [], set[str]()

    def visit(module: str, way: list[str]) -> None:
        if module in way:
            found.append(" -> ".join([*way[way.index(module) :], module]))
        elif module in graph and module not in done:
            for target in sorted(graph[module]):
                visit(target, [*way, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    return found


def families_in_planner(sources: Sources) -> list[str]:
    """Return imports of families, or of their list, by the planner and by what lies below the families."""
    families = families_of(sources)
    below = set().union(*floors_of(sources)[:4], {"planner"})
    return [
        f"{path} imports {name}"
        for path in sources
        if place_of(path) in below
        for name in imports_of(sources[path])
        if name.split(".")[0] in families | {"families"}
    ]


def words_in_core(sources: Sources, words: set[str]) -> list[str]:
    """Return where core uses a family's word, as a name or within a text that is no docstring."""
    found = []
    for path, text in sources.items():
        if place_of(path) != "core":
            continue
        tree = ast.parse(text)
        told = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
                used = set(re.findall(r"\w+", node.value))
            else:
                used = {str(getattr(node, name)) for name in ("id", "attr", "arg", "name") if hasattr(node, name)}
            found += [f"{path}:{getattr(node, 'lineno', 0)}: {word}" for word in sorted(used & words)]
    return found


def long_files(sources: Sources) -> list[str]:
    """Return files over the limit, and the median if that is."""
    lines = {path: len(text.splitlines()) for path, text in sources.items()}
    found = [f"{path} has {count} lines" for path, count in lines.items() if count > MOST_LINES]
    if (median := statistics.median(lines.values())) > MEDIAN_LINES:
        found.append(f"the median file has {median} lines")
    return found
