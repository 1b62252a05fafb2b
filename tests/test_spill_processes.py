"""Processes that spill leave no file behind, do not meet, and hold no more memory than they were given."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from processes import Running

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read memory or files from")
CHILD = """
import sys, time, torch
from pathlib import Path
from hf_accel.cache.tiers.tiers import Tiers
folder, mark, value = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
tiers = Tiers(torch.device("cpu"), store="disk", near_budget_bytes=1 << 20, folder=folder)
for i in range(10):
    tiers.put(0, torch.full((1, 1, 64, 512), value + i), torch.full((1, 1, 64, 512), value - i))
for turn in range(10**9):
    for i, (keys, values) in enumerate(tiers.read(0)):
        if not (bool((keys == value + i).all()) and bool((values == value - i).all())):
            sys.exit("wrong data")
    tiers.put(1, keys, values)
    if turn == 20:
        mark.touch()
    if turn >= 20 and sys.argv[4] == "stop":
        break
    if turn > 200:
        time.sleep(0.01)
"""


def start(folder: Path, mark: Path, value: int, what: str) -> Running:
    return Running(CHILD, mark.with_suffix(".output"), folder, mark, value, what)


def test_nothing_is_left_of_a_killed_process(tmp_path: Path) -> None:
    folder, mark = tmp_path / "cache", tmp_path / "mark"
    folder.mkdir()
    child = start(folder, mark, 1, "go on")
    until = time.monotonic() + 120
    while not mark.exists() and child.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    assert mark.exists()
    child.kill()
    assert child.wait(60) == -signal.SIGKILL
    assert list(folder.iterdir()) == []


def test_two_processes_in_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    children = [start(folder, tmp_path / f"mark{i}", 1000 * i, "stop") for i in range(2)]
    assert [child.wait(120) for child in children] == [0, 0]
    assert list(folder.iterdir()) == []


MEMORY = """
import sys, torch
from pathlib import Path
from hf_accel.cache.tiers.tiers import Tiers

def status(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024

torch.set_num_threads(1)
budget, size, count = 40 << 20, 4 << 20, 75
options = dict(store="disk", folder=sys.argv[1], prefetch=sys.argv[2] == "1")
tiers = Tiers(torch.device("cpu"), near_budget_bytes=budget, **options)
hot = torch.ones(2, 8, 64, size // 2 // 2 // 8 // 64 // 4)  # the layer's own, written again and again
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
for i in range(count):
    hot.fill_(float(i))
    tiers.put(i % 3, hot, hot)
for layer in range(3):
    tiers.select(layer, torch.tensor([1, 1]))
for _ in range(2):
    for layer in range(3):
        for i, (keys, values) in enumerate(tiers.read(layer)):
            if keys[1, 0, 0, 0] != 3 * i + layer or not torch.equal(keys, values):
                sys.exit("wrong data")
held = tiers.bytes_held()
if held["near"] > budget or held["disk"] < count * size - budget:
    sys.exit(f"held {held}")
print(status("VmHWM") - before - budget)
"""


@needs_proc
@pytest.mark.parametrize("prefetch", ["0", "1"])
def test_resident_memory_stays_within_the_budget(prefetch: str, tmp_path: Path) -> None:
    """300 MB of blocks, 40 MB of budget: the process holds at most that and 30 MB more."""
    done = Running(MEMORY, tmp_path, tmp_path, prefetch)
    assert done.wait(300) == 0, done.stderr
    assert int(done.stdout) <= 30 << 20, f"{int(done.stdout) >> 20} MB above the budget"
