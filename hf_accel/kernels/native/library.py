"""Finding and loading the native library, its instruction set and its threads.

The library links neither libtorch nor an OpenMP runtime. Its parallel regions run in the pool torch already has: the
runtime mapped into this process is looked up and its entry points are handed over, so `torch.set_num_threads` rules
both and no second pool competes for the cores. Without a runtime the kernels run on the calling thread.
"""

from __future__ import annotations

import ctypes
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ABI_VERSION = 14
ISAS = ("portable", "neon", "avx2", "avx512", "avx512_bf16", "amx", "neon_dot", "neon_i8mm")
"""Instruction sets in the order of `enum hfa_isa`; of those of a machine, later ones are preferred."""

RETRY_S = 1.0  # asking costs microseconds, looking for the library some tenths of a millisecond
_THREADING_SYMBOLS = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


@dataclass(frozen=True)
class NativeStatus:
    """What `hf-accel doctor` shows: whether the kernels are in use, and if not, why and what to do."""

    available: bool
    reason: str
    isa: str
    threading: str
    path: str | None


@dataclass(frozen=True)
class _Loaded:
    library: ctypes.CDLL | None
    reason: str
    threading: str
    path: str | None


def _openmp_paths() -> list[str]:
    """Files of OpenMP runtimes already mapped into this process, torch's own first."""
    found: dict[str, None] = {}
    maps = Path("/proc/self/maps")
    if maps.exists():
        for line in maps.read_text().splitlines():
            path = line[line.find("/") :] if "/" in line else ""
            name = os.path.basename(path)
            if "libgomp" in name or name.startswith(("libomp", "libiomp")):
                found[path] = None
    own = Path(torch.__file__).parent / "lib"
    if not found:
        for pattern in ("*gomp*", "libomp*", "libiomp*"):
            found.update(dict.fromkeys(str(path) for path in sorted(own.glob(pattern))))
    return sorted(found, key=lambda path: not path.startswith(str(own.parent.parent)))


def _connect_threads(library: ctypes.CDLL) -> str:
    """Hands the pool's entry points to the library; returns a description of what it uses."""
    for path in _openmp_paths():
        try:
            runtime = ctypes.CDLL(path)
            entries = [ctypes.cast(getattr(runtime, name), ctypes.c_void_p) for name in _THREADING_SYMBOLS]
        except (OSError, AttributeError):
            continue  # not loadable here, or a runtime without this interface: try the next
        library.hfa_set_threading(*entries)
        return f"torch's OpenMP pool ({os.path.basename(path)})"
    return "serial: no OpenMP runtime with GOMP_parallel is loaded in this process"


def _declare(library: ctypes.CDLL) -> None:
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.hfa_isa_supported.argtypes = [number]
    library.hfa_set_isa.argtypes = [number]
    library.hfa_set_threading.argtypes = [pointer] * 3
    library.hfa_set_threading.restype = None
    library.hfa_linear.argtypes = [pointer] * 4 + [integer] * 5
    library.hfa_linear_group.argtypes = [ctypes.c_char_p]
    library.hfa_packed_linear.argtypes = [pointer, ctypes.c_char_p, pointer, integer, integer]
    library.hfa_stream.argtypes = [pointer, integer, integer]
    library.hfa_stream.restype = ctypes.c_uint64
    library.hfa_attend.argtypes = [ctypes.c_char_p]
    library.hfa_prompt.argtypes = [ctypes.c_char_p]
    library.hfa_encode.argtypes = [ctypes.c_char_p]
    library.hfa_block_forward.argtypes = [ctypes.c_char_p] * 2
    library.hfa_step_forward.argtypes = [pointer] * 2
    library.hfa_mixer_step.argtypes = [ctypes.c_char_p] * 2
    library.hfa_route.argtypes = [ctypes.c_char_p]
    library.hfa_choose.argtypes = [ctypes.c_char_p]
    library.hfa_exponentials.argtypes = [pointer, pointer, integer]
    library.hfa_experts_forward.argtypes = [ctypes.c_char_p] * 2


_loaded: _Loaded | None = None
_failed_at = -math.inf


def _load() -> _Loaded:
    """Load the library, once; a failure is remembered for a second, as what was missing may have come since."""
    global _loaded, _failed_at
    if _loaded is None or (_loaded.library is None and time.monotonic() - _failed_at > RETRY_S):
        _loaded = _try_load()
        if _loaded.library is None:
            _failed_at = time.monotonic()
    return _loaded


def _try_load() -> _Loaded:
    folder = Path(__file__).parent
    candidates = sorted(folder.glob("_native*.so"))
    if not candidates:
        reason = "the library was not built: install a C compiler (gcc or clang) and reinstall hf-accel"
        return _Loaded(None, reason, "none", None)
    path = str(candidates[0])
    try:
        library = ctypes.CDLL(path)
        version = library.hfa_abi_version()
    except (OSError, AttributeError) as error:
        return _Loaded(None, f"{path} cannot be loaded ({error}): reinstall hf-accel", "none", path)
    if version != ABI_VERSION:
        reason = f"{path} has interface version {version}, this package wants {ABI_VERSION}: reinstall hf-accel"
        return _Loaded(None, reason, "none", path)
    _declare(library)
    asked = os.environ.get("HF_ACCEL_ISA")
    if asked and (asked not in ISAS or library.hfa_set_isa(ISAS.index(asked)) != 0):
        able = [name for code, name in enumerate(ISAS) if library.hfa_isa_supported(code)]
        reason = f"HF_ACCEL_ISA={asked} is not one of {', '.join(able)}: unset it or choose one of these"
        return _Loaded(None, reason, "none", path)
    return _Loaded(library, "loaded", _connect_threads(library), path)


def library() -> ctypes.CDLL:
    """The loaded library. Raises: RuntimeError with the reason where `is_available()` is false."""
    loaded = _load()
    if loaded.library is None:
        raise RuntimeError(f"native kernels are not available: {loaded.reason}")
    return loaded.library


def is_available() -> bool:
    """Whether the library is built, loads, and fits this package."""
    return _load().library is not None


def obstacles(device: torch.device) -> list[str]:
    """Return why the library cannot serve a model on this device, as sentences for the user."""
    found = []
    if not is_available():
        found.append(f"the native library is not there: {_load().reason}")
    if device.type != "cpu":
        found.append(f"the native library is for CPUs, the model is on {device}.")
    return found


def supported_isas() -> tuple[str, ...]:
    """Instruction sets this build and this machine have, slowest first; empty without the library."""
    loaded = _load().library
    return () if loaded is None else tuple(name for code, name in enumerate(ISAS) if loaded.hfa_isa_supported(code))


def set_isa(name: str) -> None:
    """Use this instruction set from now on, in the whole process. Raises: ValueError when the machine lacks it."""
    if name not in supported_isas():
        raise ValueError(
            f"instruction set {name!r} was asked for; this machine has {', '.join(supported_isas()) or 'none'}"
        )
    library().hfa_set_isa(ISAS.index(name))


def status() -> NativeStatus:
    """State of the native kernels in this process."""
    loaded = _load()
    isa = "none" if loaded.library is None else ISAS[loaded.library.hfa_isa()]
    return NativeStatus(loaded.library is not None, loaded.reason, isa, loaded.threading, loaded.path)
