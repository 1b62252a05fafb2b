"""What is read of processors, nodes and grants from the system's files, what is tried, and what the doctor says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_accel.cli.advice import advice
from hf_accel.kernels import pages
from hf_accel.measure import threads
from hf_accel.measure.pages import PageTrial
from hf_accel.measure.threads import ThreadTrial, thread_trial
from hf_accel.measure.topology import Topology

Patch = pytest.MonkeyPatch
PLAIN = Topology(8, 8, None, (8,), "default", 8, 0, {})
TRIED = ThreadTrial(8, {1: 10e9, 8: 40e9}, {1: 9e9, 8: 38e9})
PAGED = PageTrial(40e9, 41e9, 0.3)


@pytest.fixture(autouse=True)
def _pages_are_granted(monkeypatch: Patch) -> None:
    monkeypatch.setattr(pages, "obstacle", lambda: None)


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def two_nodes_with_siblings(root: Path) -> Path:
    """Four cores of two processors each, two cores on a node; a third node has memory and no processors."""
    siblings = {
        f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n % 4},{n % 4 + 4}" for n in range(8)
    }
    nodes = {f"sys/devices/system/node/node{n}/cpulist": text for n, text in enumerate(("0-1,4-5", "2-3,6-7", ""))}
    return put(root, siblings | nodes | {"proc/sys/vm/overcommit_memory": "2"})


def test_nodes_and_siblings(tmp_path: Path) -> None:
    found = Topology.here(two_nodes_with_siblings(tmp_path), set(range(8)))
    assert (found.logical, found.physical, found.nodes, found.overcommit) == (8, 4, (4, 4), 2)
    part = Topology.here(tmp_path, {0, 1, 2, 4})  # an affinity mask: 0 and 4 are one core
    assert (part.logical, part.physical, part.nodes) == (4, 3, (3, 1))


def test_where_the_system_says_nothing(tmp_path: Path) -> None:
    found = Topology.here(tmp_path, {0, 1, 2})
    assert (found.logical, found.physical, found.nodes) == (3, 3, (3,))
    assert (found.quota, found.overcommit, found.policy) == (None, None, "default")


@pytest.mark.parametrize(
    "files,granted",
    [
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "150000 100000"}, 1.5),
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/b/cpu.max": "100000 100000",
                "sys/fs/cgroup/cpu.max": "50000 100000",
            },
            0.5,
        ),
        ({"sys/fs/cgroup/cpu.max": "400000 100000"}, 4.0),
        (
            {
                "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/x",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000",
            },
            2.0,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            None,
        ),
    ],
)
def test_what_the_control_group_grants(files: dict[str, str], granted: float | None, tmp_path: Path) -> None:
    assert Topology.here(put(tmp_path, files), {0}).quota == granted


def test_this_machine() -> None:
    found = Topology.here()
    assert 1 <= found.physical <= found.logical
    assert sum(found.nodes) == found.logical
    assert found.threads == torch.get_num_threads()


def test_a_trial_leaves_the_threads_as_they_were(monkeypatch: Patch) -> None:
    monkeypatch.setattr(threads, "_BYTES", 8 << 20)
    before = torch.get_num_threads()
    found = thread_trial(replace(PLAIN, logical=2, physical=1, quota=3.5, nodes=(1, 1)))
    assert torch.get_num_threads() == before
    assert found.reads.keys() == found.products.keys() == {1, 2, before}
    assert all(rate > 0 for rate in (*found.reads.values(), *found.products.values()))
    assert found.spread is not None
    assert thread_trial(replace(PLAIN, logical=1, physical=1)).spread is None
    with monkeypatch.context() as patch:
        patch.setattr(threads, "_read", lambda buffer: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            thread_trial(PLAIN)
    assert torch.get_num_threads() == before


def test_few_threads_are_best_where_more_gain_nothing() -> None:
    assert ThreadTrial(8, {}, {1: 10.0, 4: 39.0, 8: 40.0}).best == 8  # in use, and as good as any
    assert ThreadTrial(1, {}, {1: 10.0, 4: 39.0, 8: 40.0}).best == 4
    slowed = ThreadTrial(16, {}, {1: 10.0, 8: 40.0, 16: 20.0})
    assert (slowed.best, slowed.gain) == (8, 2.0)


@pytest.mark.parametrize(
    "found,trial,words",
    [
        (replace(PLAIN, threads=9), None, "9 run on 8 processors"),
        (replace(PLAIN, physical=4), None, "8 run on 4 cores"),
        (replace(PLAIN, quota=1.5), None, "torch.set_num_threads(1)"),
        (replace(PLAIN, logical=1, physical=1, threads=1), None, "there is one processor"),
        (replace(PLAIN, nodes=(4, 4)), TRIED, "numactl --interleave=all, or"),
        (replace(PLAIN, nodes=(4, 4)), replace(TRIED, spread=1.6), "read 1.60 x as fast: start with numactl"),
        (replace(PLAIN, overcommit=2), None, "overcommit_memory is 2"),
        (
            replace(PLAIN, threads=1, variables={"OMP_NUM_THREADS": "1"}),
            replace(TRIED, threads=1),
            "8 instead of 1 read 4.22 x as fast: call torch.set_num_threads(8) (OMP_NUM_THREADS=1 is set)",
        ),
    ],
)
def test_advice(found: Topology, trial: ThreadTrial | None, words: str) -> None:
    assert any(words in sentence for sentence in advice(found, trial, None)), advice(found, trial, None)


def test_nothing_is_said_where_nothing_gains() -> None:
    assert advice(PLAIN, TRIED, PAGED) == []
    assert advice(replace(PLAIN, nodes=(4, 4), policy="interleave:0-1"), TRIED, PAGED) == []


def test_what_large_pages_gain_and_why_there_are_none(monkeypatch: Patch) -> None:
    assert "1.15 x as fast" in advice(PLAIN, None, replace(PAGED, large=46e9))[0]
    monkeypatch.setattr(pages, "obstacle", lambda: "nobody gets any here.")
    assert "nobody gets any here" in advice(PLAIN, None, None)[0]
