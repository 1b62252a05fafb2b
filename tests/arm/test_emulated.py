"""The tests of the native kernels on emulated Arm machines: the same calls and the same bounds as on this machine.

Slow: `pytest -m slow tests/arm`. Wants the Debian packages that guest.py names, no Arm machine. How long the kernels
take there says nothing of a real one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import guest
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(guest.missing()), reason=guest.missing())]
KERNELS = guest.ROOT / "tests" / "kernels"
MACHINES = {
    "cortex-a53": ("portable", "neon"),
    "neoverse-n1": ("neon", "neon_dot"),
    "max": ("neon_dot", "neon_i8mm"),
}
"""CPUs that qemu knows: without dot products, with sdot, with smmla and bfmmla as well; and the sets tested there."""
ABOUT_LOADING = (  # of the library, which is loaded by other means here
    "test_the_environment_lowers_the_instruction_set",
    "test_a_failure_to_load_is_not_remembered",
    "test_an_instruction_set_the_machine_lacks_is_refused",
)
NAMES = (
    "linear",
    "packed",
    "packed_rows",
    "fp4",
    "attend",
    "prompt",
    "block_cached",
    "block_parts",
    "ragged",
    "experts",
    "route",
    "recurrent",
    "choose",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return guest.build(tmp_path_factory.mktemp("arm"))


def run(
    name: str, cpu: str, isas: tuple[str, ...], built: tuple[Path, Path], *more: str
) -> subprocess.CompletedProcess[str]:
    folders = (guest.ROOT, Path(__file__).parent)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "HFA_GUEST": ":".join((cpu, *map(str, built), *isas)),
    }
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "emulate", str(KERNELS / f"test_native_{name}.py")]
    command += ["-k", " and ".join(f"not {title}" for title in ABOUT_LOADING), *more]
    return subprocess.run(command, env=environment, cwd=guest.ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("cpu", MACHINES)
@pytest.mark.parametrize("name", NAMES)
def test_kernels_do_there_what_they_do_here(name: str, cpu: str, built: tuple[Path, Path]) -> None:
    done = run(name, cpu, MACHINES[cpu], built)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout)


def test_a_machine_has_what_it_says(built: tuple[Path, Path]) -> None:
    """Each set is found where its instructions are, and on no machine without them."""
    for cpu, expected in {"cortex-a53": 2, "cortex-a72": 2, "neoverse-n1": 3, "max": 4}.items():
        machine = guest.Guest(cpu, *built)
        found = [name for code, name in enumerate(guest.ISAS) if machine.hfa_isa_supported(code)]
        assert found == ["portable", "neon", "neon_dot", "neon_i8mm"][:expected]
        assert guest.ISAS[machine.hfa_isa()] == found[-1]
        machine.close()


VECTORS, TILES = "arch/arm/vec_neon.h", "arch/arm/tile_bfmmla.h"
DEFECTS = {  # of which file, and where they are seen: by which tests, on which CPU, with which set
    "a wrong factor": (VECTORS, "vmull_high_s16(a, b)", "vmull_high_s16(a, a)", "packed", "cortex-a53", "neon"),
    "a wrong sign": (VECTORS, "vpaddq_s16(vmull_s8(", "vpaddq_s16(-vmull_s8(", "packed", "cortex-a53", "neon"),
    "rounded down": (VECTORS, "vdupq_n_u32(0x7fff)", "vdupq_n_u32(0)", "linear", "cortex-a53", "neon"),
    "rows exchanged": (VECTORS, "row ? vuzp2q_s32", "!row ? vuzp2q_s32", "packed", "max", "neon_i8mm"),
    "low bytes of the wrong row": (VECTORS, "row ? vzip2q_s64", "!row ? vzip2q_s64", "packed_rows", "max", "neon_i8mm"),
    "columns twice": (TILES, "at + 8, high)", "at + 8, g ? low : high)", "linear", "max", "neon_i8mm"),
    "a row of x without its partner": (TILES, "m % 2 ? vget_high", "m % 3 ? vget_high", "linear", "max", "neon_i8mm"),
}


@pytest.mark.parametrize("title", DEFECTS)
def test_a_planted_defect_is_seen(title: str, tmp_path: Path) -> None:
    file, old, new, name, cpu, isa = DEFECTS[title]
    sources = Path("hf_accel/kernels/native/csrc")
    shutil.copytree(guest.ROOT / sources, tmp_path / sources)
    shutil.copy(guest.ROOT / "pyproject.toml", tmp_path)
    text = (tmp_path / sources / file).read_text()
    assert text.count(old) == 1
    (tmp_path / sources / file).write_text(text.replace(old, new))
    done = run(name, cpu, (isa,), guest.build(tmp_path, tmp_path, "-O1"), "-x")
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    assert "AssertionError" in done.stdout or "assert" in done.stdout
