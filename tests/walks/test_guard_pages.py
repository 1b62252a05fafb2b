"""No native call reads or writes outside its operands: they end at a page that cannot be touched, or begin behind one.

That ends the process, on any instruction set, in any function; so the sweep runs in one of its own. It also compares
every instruction set with portable C: by rounding, and to the last bit where docs/how-it-works.md says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from guard_cases import KINDS
from sweeping import copy_of_the_package, sweep

from hf_accel.kernels import native

pytestmark = pytest.mark.native
# of the norm of portable C's result: other orders of fp32 sums, then roundings of intermediates that may flip
BOUNDS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
X86 = ("avx2", "avx512", "avx512_bf16", "amx")
WIDE = X86[1:]
CODES = 2e-2  # where states are rounded to codes on the way, a last bit may move a value by a step


def equal_to(kind: str, dtype: str, isa: str) -> str | None:
    """Return what the results of an instruction set equal to the last bit: "portable", "best", or neither."""
    if isa not in X86:
        return None
    if kind.startswith("encode") or (kind == "transposed" and dtype != "float32"):
        return "portable"
    if isa == "amx" and dtype == "bfloat16":
        return None
    return "best" if kind.startswith("packed") or (isa in WIDE and dtype != "bfloat16") else None


def check(found: dict[str, Any]) -> None:
    assert {key.rpartition(" ")[0] for key in found} == set(KINDS)
    for key, by_isa in found.items():
        assert list(by_isa) == list(native.supported_isas())
        kind, _, dtype = key.rpartition(" ")
        bound = BOUNDS[dtype] + (CODES if kind.startswith(("packed", "block")) else 0.0)
        for isa, seen in by_isa.items():
            assert seen["difference"] < bound, f"{key} on {isa}: differs from portable C by {seen['difference']:.1e}"
            twin = equal_to(kind, dtype, isa)
            assert twin is None or seen[twin] == seen["cases"], f"{key} on {isa} is not bit-equal to {twin}: {seen}"


def test_nothing_reads_or_writes_outside_its_operands() -> None:
    check(sweep(1, 1.0))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_nothing_reads_or_writes_outside_its_operands_in_many_cases(seed: int) -> None:
    check(sweep(seed, 60.0))


def read_whole_steps(csrc: Path) -> None:
    """The rest of a row is loaded as a whole step; the activations beside what lies behind it are zero."""
    body = csrc / "bodies" / "product_body.h"
    text = body.read_text()
    right = "memcpy(tail, p, (size_t)n * sizeof(T));"
    assert text.count(right) == 1
    body.write_text(text.replace(right, "(void)n; memcpy(tail, p, sizeof tail);"))


@pytest.mark.slow
def test_a_read_past_a_row_is_seen(tmp_path: Path) -> None:
    package = copy_of_the_package(tmp_path, ["-O1"], read_whole_steps)
    with pytest.raises(AssertionError, match=r"exit status -\d+ in\n  \w+: (linear|group|block)"):
        sweep(1, 30.0, package=package)
