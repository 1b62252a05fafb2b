"""Which configuration a kernel runs with: what tuning found on this kind of device, or the kernel's own default.

Findings are kept in one JSON file per kind of device, in the folder that `HF_ACCEL_CACHE` names, else in
`hf_accel/tuning` beside the other caches of Hugging Face (`HF_HOME`) or of the user (`XDG_CACHE_HOME`). A file that
cannot be read is as none, and is replaced by the next finding; one that cannot be written costs the finding at the end
of the process. Nothing is timed while a graph is captured, and nothing without being asked (`tune`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

Config = dict[str, int]
VERSION = 1
"""Of what the names in a file mean; findings of another version are not read."""
_ROUNDS = 3
_FLUSHED = 128 << 20  # bytes that are written to leave nothing else in the cache of any GPU

_lock = threading.Lock()
_found: dict[Path, dict[str, Config]] = {}


def folder() -> Path:
    """Return the folder of the findings."""
    if asked := os.environ.get("HF_ACCEL_CACHE"):
        return Path(asked).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hf_accel" / "tuning"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "hf_accel" / "tuning"


def chosen(kernel: str, device: torch.device, dtype: Any, shape: Sequence[Any], default: Config) -> Config:
    """Return the configuration of a kernel for a shape: the one found on this kind of device, else the default."""
    found = _findings(file_of(device)).get(_key(kernel, dtype, shape))
    return default if found is None or "num_warps" not in found else found


def tune(
    kernel: str,
    device: torch.device,
    dtype: Any,
    shape: Sequence[Any],
    candidates: Sequence[Config],
    seconds: Callable[[Config], float],
) -> Config | None:
    """Return the fastest configuration, from the file or by timing each; None while a graph is captured.

    seconds: runs the kernel with a configuration and returns how long it took; a configuration that the device cannot
    run (it raises RuntimeError or an error of the compiler) is passed over.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return None
    path, key = file_of(device), _key(kernel, dtype, shape)
    if (known := _findings(path).get(key)) is not None:
        return known
    best, least = None, float("inf")
    for config in candidates:
        try:
            needed = min(seconds(config) for _ in range(_ROUNDS))
        except Exception:  # Triton's errors have no common class: out of resources, failed compilations
            continue
        if needed < least:
            best, least = config, needed
    if best is not None:
        _keep(path, key, best)
    return best


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Return how long a launch takes on a CUDA device, with what it reads in no cache; it is compiled before."""
    call()
    flushed = torch.empty(_FLUSHED, dtype=torch.uint8, device=device)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flushed.zero_()
    first.record()
    call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def file_of(device: torch.device) -> Path:
    """Return the file of the findings on this kind of device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return folder() / f"{re.sub('[^A-Za-z0-9]+', '-', name).strip('-').lower()}.json"


def forget() -> None:
    """Read the files anew when next asked."""
    with _lock:
        _found.clear()


def _key(kernel: str, dtype: Any, shape: Sequence[Any]) -> str:
    return "/".join([kernel, str(dtype).removeprefix("torch."), *map(str, shape)])


def _findings(path: Path) -> dict[str, Config]:
    found = _found.get(path)
    if found is None:
        with _lock:
            found = _found.setdefault(path, _read(path))
    return found


def _read(path: Path) -> dict[str, Config]:
    try:
        content = json.loads(path.read_text())
        if content["version"] != VERSION:
            return {}
        return {
            str(key): {str(name): int(value) for name, value in config.items()}
            for key, config in content["found"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _keep(path: Path, key: str, config: Config) -> None:
    with _lock:
        found = _found.setdefault(path, {})
        found[key] = config
        merged = _read(path) | found  # another process may have written since
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump({"version": VERSION, "found": merged}, file, indent=1, sort_keys=True)
                os.replace(name, path)
            except OSError:
                os.unlink(name)
                raise
