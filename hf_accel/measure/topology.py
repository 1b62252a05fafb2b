"""The processors this process may use and how they lie: cores, nodes, and what its control group grants."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
_QUOTAS = ("cpu.cfs_quota_us", "cpu.cfs_period_us")  # of control groups of the first version


@dataclass(frozen=True)
class Topology:
    """What the system says. Nothing is known (None, or one node of all) where it says nothing.

    logical: processors in this process's affinity mask; physical: cores among them, siblings of one core counted once.
    quota: processors' worth of time that the control group grants in each period; None: no limit.
    nodes: processors of each memory node, of those this process may use; nodes without any are left out.
    policy: where new memory goes ("default": to the node of who first writes to it).
    overcommit: 0 to 2, as `vm.overcommit_memory`: 2 refuses what the system could not back.
    variables: of those that say how many threads run and where, the ones that are set.
    """

    logical: int
    physical: int
    quota: float | None
    nodes: tuple[int, ...]
    policy: str
    threads: int
    overcommit: int | None
    variables: dict[str, str]

    @classmethod
    def here(cls, root: Path = Path("/"), usable: set[int] | None = None) -> Topology:
        """Read the topology from the system's files below `root`; usable: the affinity mask, None: this process's."""
        if usable is None:
            has_mask = hasattr(os, "sched_getaffinity")
            usable = os.sched_getaffinity(0) if has_mask else set(range(os.cpu_count() or 1))
        cpus, nodes = root / "sys/devices/system/cpu", root / "sys/devices/system/node"
        siblings = {_text(cpus / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in usable}
        lists = [_numbers(_text(path)) & usable for path in sorted(nodes.glob("node*/cpulist"))]
        found = tuple(len(each) for each in lists if each)
        mode = _text(root / "proc/sys/vm/overcommit_memory")
        maps = _text(root / "proc/self/numa_maps").splitlines()
        return cls(
            logical=len(usable),
            physical=len(siblings),
            quota=_quota(root),
            nodes=found or (len(usable),),
            policy=maps[0].split()[1] if maps and len(maps[0].split()) > 1 else "default",
            threads=torch.get_num_threads(),
            overcommit=int(mode) if mode.isdigit() else None,
            variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        )


def _text(path: Path) -> str:
    """Return what a file of the system says, "" where there is none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _numbers(text: str) -> set[int]:
    """Return the numbers of a list such as 0-3,8."""
    found: set[int] = set()
    for part in text.split(",") if text else ():
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def _quota(root: Path) -> float | None:
    """Return the least that the control group or one above it grants, in processors."""
    granted = []
    for line in _text(root / "proc/self/cgroup").splitlines() or ["0::/"]:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / controllers
        own = base / path.lstrip("/")
        for folder in (own, *own.parents):
            quota, _, period = _text(folder / "cpu.max").partition(" ")
            if controllers:
                quota, period = (_text(folder / name) for name in _QUOTAS)
            if quota.isdigit() and period.isdigit() and int(period):
                granted.append(int(quota) / int(period))
            if folder == base:
                break
    return min(granted, default=None)
