"""The machine and the software that a measurement was made with: a figure without them says nothing."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import transformers


@dataclass(frozen=True)
class Machine:
    """What was measured on. `cores` are those this process may use, `threads` those torch does use."""

    cpu: str
    cores: int
    threads: int
    memory_bytes: int | None
    system: str
    gpu: str | None

    @classmethod
    def here(cls) -> Machine:
        """Describe the machine this process runs on."""
        return cls(
            cpu=_cpu_name(),
            cores=_usable_cores(),
            threads=torch.get_num_threads(),
            memory_bytes=_memory_bytes(),
            system=f"{platform.system()} {platform.machine()}",
            gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        )


def versions() -> dict[str, str]:
    """Return the versions of what takes part: Python, torch, transformers, hf-accel."""
    try:
        own = metadata.version("hf-accel")
    except metadata.PackageNotFoundError:
        own = "source tree"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_accel": own,
    }


def resident_bytes() -> int | None:
    """Return the memory this process holds now; None without psutil (extra: bench)."""
    try:
        import psutil
    except ImportError:
        return None
    return psutil.Process().memory_info().rss


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    names = getattr(os, "sysconf_names", {})
    if "SC_PAGE_SIZE" in names and "SC_PHYS_PAGES" in names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
