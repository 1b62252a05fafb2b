"""The native library under AddressSanitizer and UndefinedBehaviorSanitizer: the sweep, and the tests of the kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sweeping import ROOT, copy_of_the_package, runtime_of, sweep
from test_guard_pages import read_whole_steps

pytestmark = [
    pytest.mark.native,
    pytest.mark.slow,
    pytest.mark.skipif(not runtime_of("asan"), reason="no gcc with AddressSanitizer on this machine"),
]
FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g"]
ENVIRONMENT = {
    "LD_PRELOAD": runtime_of("asan"),  # before Python's own allocations
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",  # what Python never frees is no fault
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_the_package(tmp_path_factory.mktemp("sanitized"), FLAGS)


def test_the_sweep_has_no_fault(package: Path) -> None:
    assert sweep(11, 120.0, "plain", package=package, **ENVIRONMENT)


def test_the_kernels_tests_have_no_fault(package: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            str(ROOT / "tests" / "kernels"),
            "-x",
            "-p",
            "no:cacheprovider",
            "--override-ini",
            "addopts=-q",
        ],
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(package)},
        cwd=package,  # `-m` puts this folder first, and the package in it
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stdout[-3000:] + done.stderr[-3000:]


def test_an_overflow_is_seen(tmp_path: Path) -> None:
    package = copy_of_the_package(tmp_path, ["-fsanitize=address", "-O1"], read_whole_steps)
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        sweep(1, 30.0, "plain", package=package, **ENVIRONMENT)
