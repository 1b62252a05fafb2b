"""A pytest plugin, `-p emulate`: the native library of this run is the one that HFA_GUEST names, see guest.py.

HFA_GUEST: the CPU, the library, what calls it, and the instruction sets to test, parted by colons.
"""

from __future__ import annotations

import os
from pathlib import Path

from guest import Guest

from hf_accel.kernels.native import library

cpu, path, caller, *isas = os.environ["HFA_GUEST"].split(":")
_guest = Guest(cpu, Path(path), Path(caller), tuple(isas))
library._declare(_guest)  # type: ignore[arg-type]
_loaded = library._Loaded(_guest, "loaded", f"serial: emulated {cpu}", path)  # type: ignore[arg-type]
library._loaded = _loaded
library._try_load = lambda: _loaded
library.set_isa(isas[-1])


def pytest_unconfigure() -> None:
    _guest.close()
