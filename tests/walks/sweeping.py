"""Runs the sweep over native calls in a process of its own, on this build of the library or on one built otherwise."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hf_accel

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
NATIVE = Path("hf_accel/kernels/native")


def sweep(seed: int, seconds: float, *mode: str, package: Path | None = None, **environment: str) -> dict[str, Any]:
    """Return what `guard_sweep.py` found; an AssertionError names the call in which its process ended.

    package: the folder that `copy_of_the_package` made; None: the package under test.
    """
    places = [FOLDER, package or Path(hf_accel.__file__).parents[1]]
    done = subprocess.run(
        [sys.executable, str(FOLDER / "guard_sweep.py"), str(seed), str(seconds), *mode],
        env=os.environ
        | environment
        | {"PYTHONPATH": os.pathsep.join(map(str, places)), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stdout.strip().rpartition("\n")[2]
    if done.returncode:
        raise AssertionError(f"exit status {done.returncode} in\n  {last}\n{done.stderr[:3000]}")
    return json.loads(last)  # type: ignore[no-any-return]


def copy_of_the_package(folder: Path, flags: list[str], change: Callable[[Path], None] | None = None) -> Path:
    """Copy the package into `folder`, `change` the C sources there, build them with further flags; returns `folder`."""
    shutil.copytree(
        Path(hf_accel.__file__).parent, folder / "hf_accel", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    if change is not None:
        change(folder / NATIVE / "csrc")
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"][0]
    library = folder / NATIVE / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"

    def compiled(source: str) -> str:
        made = str(folder / Path(source).with_suffix(".o").name)
        compiler = ["gcc", *build["extra-compile-args"], "-fPIC", *flags]
        subprocess.run([*compiler, "-c", source, "-o", made], cwd=folder, check=True, capture_output=True)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, build["sources"]))
    libraries = [f"-l{name}" for name in build["libraries"]]
    subprocess.run(
        ["gcc", "-shared", *flags, *objects, "-o", str(library), *libraries], check=True, capture_output=True
    )
    return folder


def runtime_of(sanitizer: str) -> str:
    """Return the path of gcc's runtime library, or "" where there is none."""
    if shutil.which("gcc") is None:
        return ""
    found = subprocess.run(["gcc", f"-print-file-name=lib{sanitizer}.so"], capture_output=True, text=True, check=True)
    return path if os.path.isabs(path := found.stdout.strip()) else ""
