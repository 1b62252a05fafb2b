"""Rules of every file, read from the source: sizes, names, and what must not be in a package; public names."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import hf_accel

PACKAGE = Path(hf_accel.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
MAXIMUM_LINES = 400


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(tree_of(path)))


def too_many_lines(path: Path) -> Iterator[str]:
    lines = len(path.read_text().splitlines())
    if lines > MAXIMUM_LINES:
        yield f"{lines} lines; split it by what it is about"


def names_that_say_nothing(path: Path) -> Iterator[str]:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    said = {"utils", "util", "helpers", "helper", "base", "misc", "common", "tools"}.intersection(parts)
    yield from (f"{part!r} does not say what is inside" for part in said)


def prints_asserts_and_bare_excepts(path: Path) -> Iterator[str]:
    for node in nodes_of(path):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Assert):
            yield f"{line}: raise an error of the tree instead of assert"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{line}: no print in the package"
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                yield f"{line}: bare except"
            if all(isinstance(child, ast.Pass) for child in node.body):
                yield f"{line}: an error is swallowed without a trace"


def comparisons_of_architectures(path: Path) -> Iterator[str]:
    for node in nodes_of(path):
        if isinstance(node, ast.Compare) and "model_type" in ast.unparse(node):
            yield f"{node.lineno}: no architecture is known by its name"


def missing_docstrings(path: Path) -> Iterator[str]:
    tree = tree_of(path)
    if not ast.get_docstring(tree):
        yield "1: say in one sentence what this module is"
    for node in tree.body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef)) or node.name.startswith("_"):
            continue
        if isinstance(node, ast.ClassDef) and node.name.endswith("Patcher"):
            continue  # described by its config
        if not ast.get_docstring(node):
            yield f"{node.lineno}: {node.name} has no docstring"


RULES: dict[Callable[[Path], Iterator[str]], list[Path]] = {
    too_many_lines: [*FILES, *TESTS, *EXAMPLES],
    names_that_say_nothing: FILES,
    prints_asserts_and_bare_excepts: FILES,
    comparisons_of_architectures: FILES,
    missing_docstrings: FILES,
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_file_breaks_the_rule(rule: Callable[[Path], Iterator[str]]) -> None:
    """One case per rule: the message lists every place that breaks it."""
    offenders = [f"{name_of(path)}:{sentence}" for path in RULES[rule] for sentence in rule(path)]
    assert not offenders, "\n".join(["", *offenders])


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
    others = set(hf_accel.__all__) - set(hf_accel.families.__all__)  # configs have a page of their own
    missing = [name for name in sorted(others) if not re.search(rf"`(hf_accel\.)?{name}\b", page)]
    assert not missing, f"add to docs/reference.md: {', '.join(missing)}"


def test_configs_are_in_their_page() -> None:
    from catalogue import CATALOGUE

    page = (ROOT / "docs" / "configs.md").read_text()
    missing = [type(config).__name__ for config in CATALOGUE if type(config).__name__ not in page]
    assert not missing, f"add a row to docs/configs.md: {', '.join(missing)}"


def test_importing_changes_nothing_global_but_registrations() -> None:
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
    if new != {"hfaccel_grouped", "hfaccel_eager", "hfaccel_heard"}:
        sys.exit(f"{name}: {new}")
    after[name] = {k: v for k, v in after[name].items() if k not in new}
for name in before:
    if before[name] != after[name]:
        sys.exit(f"{name} changed")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
