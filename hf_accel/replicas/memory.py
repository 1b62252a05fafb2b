"""Memory of a process, and how much of it others share."""

from __future__ import annotations

import re
from pathlib import Path

_LINE = re.compile(r"^(Rss|Pss|Shared_Clean|Shared_Dirty|Private_Clean|Private_Dirty): +(\d+) kB$", re.MULTILINE)


def memory_of(pid: int, root: Path = Path("/proc")) -> dict[str, int] | None:
    """Return bytes of a process: "resident", "private" (what its end gives back) and "shared"; None: it is not told.

    Source: `smaps_rollup` of proc(5).
    """
    try:
        text = (root / str(pid) / "smaps_rollup").read_text()
    except OSError:
        return None
    found = {name: 1024 * int(value) for name, value in _LINE.findall(text)}
    return {
        "resident": found.get("Rss", 0),
        "private": found.get("Private_Clean", 0) + found.get("Private_Dirty", 0),
        "shared": found.get("Shared_Clean", 0) + found.get("Shared_Dirty", 0),
    }
