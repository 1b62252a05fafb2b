"""Every kernel in Triton compiles for a GPU, which need not be there, and reads memory in wide loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

KERNELS = {
    "linear._one_row", "linear._few_rows", "packed_rows.one_row", "packed_rows.few_rows", "norm._add_norm",
    "rotary._rotary", "attention_splits.split_keys", "attention_splits.merge", "choose._chunks", "choose._final",
}  # fmt: skip
SHARED = 227 * 1024  # bytes that a program may have on compute capability 9.0


def compiled(tmp_path: Path) -> list[dict[str, Any]]:
    here = Path(__file__).parent
    paths = [str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path),
                   "PYTHONPATH": os.pathsep.join(filter(None, paths))}  # fmt: skip
    program = [sys.executable, str(here / "ahead_of_time.py")]
    made = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-2000:]
    return [json.loads(line) for line in made.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.triton
def test_every_launch_compiles(tmp_path: Path) -> None:
    launches = compiled(tmp_path)
    assert {launch["kernel"] for launch in launches} == KERNELS
    assert max(launch["shared"] for launch in launches) <= SHARED
    wide = Counter(
        launch["kernel"] for launch in launches if launch.get("ld.global.v4.b32") or launch.get("cp.async.cg")
    )
    for kernel in ("linear._one_row", "linear._few_rows", "packed_rows.one_row", "attention_splits.split_keys"):
        assert wide[kernel]
    products = [launch for launch in launches if launch["kernel"].endswith("few_rows")]
    assert any(launch.get("mma.sync.aligned.m16n8k16") for launch in products)
    # a product that is rounded before it is added to another: a compiler that fuses the two leaves the rounding out
    assert not [launch["kernel"] for launch in launches if {"fma.rn.f16", "fma.rn.bf16"} & launch.keys()]
