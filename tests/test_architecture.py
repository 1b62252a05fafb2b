"""The house rules, read from the source: floors, sizes, names, and what must not be in a package."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_accel

PACKAGE = Path(hf_accel.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
FLOORS = {
    "errors": 0,
    "ops": 0,
    "assets": 0,
    "kernels": 1,
    "core": 2,
    "measure": 3,
    "layers": 4,
    "attention": 4,
    "cache": 4,
    "decoding": 4,
    "quantization": 4,
    "speculative": 4,
    "planner": 6,
    "api": 7,
    "cli": 7,
}
FAMILIES = {"layers", "attention", "cache", "decoding", "quantization", "speculative"}
MAXIMUM_LINES = 400


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def place_of(path: Path) -> str:
    """Return the floor's name of a file: the first folder or file below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[tuple[int, str]]:
    """Return line and dotted name of every import from the package, those of TYPE_CHECKING blocks excepted."""
    tree = ast.parse(path.read_text())
    typing_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: write absolute imports"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return [(line, name) for line, name in found if name.split(".")[0] == "hf_accel"]


def test_every_place_has_a_floor() -> None:
    for path in FILES:
        if path != PACKAGE / "__init__.py":
            assert place_of(path) in FLOORS, (
                f"{name_of(path)}: add {place_of(path)!r} to FLOORS in {Path(__file__).name}"
            )


@pytest.mark.parametrize("path", [path for path in FILES if path != PACKAGE / "__init__.py"], ids=name_of)
def test_imports_only_from_floors_below(path: Path) -> None:
    own = place_of(path)
    for line, name in imports_of(path):
        parts = name.split(".")
        assert len(parts) > 1, f"{name_of(path)}:{line}: import from the module, not from the package"
        other = parts[1]
        if other == own or other == "__version__":
            continue
        where = f"{name_of(path)}:{line}: {own} imports {name}"
        assert not (own in FAMILIES and other in FAMILIES), f"{where}: families never import each other"
        assert FLOORS.get(other, 99) < FLOORS[own], f"{where}: only floors below {FLOORS[own]}"


@pytest.mark.parametrize("path", [*FILES, *TESTS, *EXAMPLES], ids=name_of)
def test_files_are_small(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MAXIMUM_LINES, f"{name_of(path)} has {lines} lines; split it by what it is about"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_names_say_what_is_inside(path: Path) -> None:
    for part in path.relative_to(PACKAGE).with_suffix("").parts:
        assert part not in {"utils", "util", "helpers", "helper", "base", "misc", "common", "tools"}, name_of(path)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_print_assert_or_bare_except(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{name_of(path)}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Assert), f"{where}: raise an error of the tree instead of assert"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{where}: no print in the package"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{where}: bare except"
            silent = all(isinstance(child, ast.Pass) for child in node.body)
            assert not silent, f"{where}: an error is swallowed without a trace"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_anatomy_knows_architectures(path: Path) -> None:
    if path == PACKAGE / "core" / "anatomy.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            assert "model_type" not in ast.unparse(node), (
                f"{name_of(path)}:{node.lineno}: architectures belong in anatomy"
            )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_modules_classes_and_public_functions_are_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{name_of(path)}: say in one sentence what this module is"
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Patcher"):
                continue  # described by its config
            assert ast.get_docstring(node), f"{name_of(path)}:{node.lineno}: {node.name} has no docstring"


def test_public_names() -> None:
    assert sorted(hf_accel.__all__) == list(hf_accel.__all__)
    for name in hf_accel.__all__:
        value = getattr(hf_accel, name)
        assert value.__doc__, f"hf_accel.{name} has no docstring"
        assert not (value.__doc__ or "").startswith(f"{name}("), f"hf_accel.{name}: only the dataclass's own signature"
    public = {
        name for name, value in vars(hf_accel).items() if not name.startswith("_") and not hasattr(value, "__path__")
    }
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    assert public - modules == set(hf_accel.__all__), "list it in hf_accel.__all__, or do not import it there"


def test_public_names_are_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference.md").read_text()
    missing = [name for name in hf_accel.__all__ if not re.search(rf"`(hf_accel\.)?{name}\b", page)]
    assert not missing, f"add to docs/reference.md: {', '.join(missing)}"


def test_configs_are_in_their_page() -> None:
    from catalogue import CATALOGUE

    page = (ROOT / "docs" / "configs.md").read_text()
    missing = [type(config).__name__ for config in CATALOGUE if type(config).__name__ not in page]
    assert not missing, f"add a row to docs/configs.md: {', '.join(missing)}"


def test_importing_changes_nothing_global_but_two_registrations() -> None:
    """In a fresh process: transformers' and torch's classes, registries, threads and random state before and after."""
    script = """
import logging, os, sys, warnings
import torch, transformers
from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin, PreTrainedModel, DynamicCache
from transformers import modeling_utils, masking_utils
from transformers.models.llama import modeling_llama
from transformers.integrations import sdpa_attention

def state():
    return {
        "classes": {c.__qualname__: dict(vars(c)) for c in (PreTrainedModel, GenerationMixin, DynamicCache,
                    torch.nn.Module, torch.nn.Linear, torch.Tensor, modeling_llama.LlamaAttention,
                    modeling_llama.LlamaDecoderLayer)},
        "modules": {m.__name__: dict(vars(m)) for m in (modeling_llama, sdpa_attention, torch.nn.functional)},
        "attention": dict(AttentionInterface._global_mapping), "masks": dict(AttentionMaskInterface._global_mapping),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()), "random": torch.get_rng_state().tolist(),
        "dtype": torch.get_default_dtype(), "environment": dict(os.environ), "grad": torch.is_grad_enabled(),
        "warnings": list(warnings.filters), "handlers": list(logging.getLogger().handlers),
        "level": logging.getLogger().level, "hook": sys.excepthook,
    }

before = state()
import hf_accel
after = state()
for name in ("attention", "masks"):
    new = set(after[name]) - set(before[name])
    if new != {"hfaccel_grouped"}:
        sys.exit(f"{name}: {new}")
    after[name] = {k: v for k, v in after[name].items() if k not in new}
for name in before:
    if before[name] != after[name]:
        sys.exit(f"{name} changed")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
