"""The native library compiled for AArch64, run by an emulator, in the place of this machine's own.

A call goes to the emulated process by name; memory goes there a page at a time, where it is touched, and comes back
where it was changed. What was compiled for this machine is not asked: tests of the kernels are tests of Arm then.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import threading
import tomllib
from pathlib import Path
from typing import Any

from hf_accel.kernels.native.library import ISAS

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR, SYSTEM = "aarch64-linux-gnu-gcc", "qemu-aarch64", "/usr/aarch64-linux-gnu"
PACKAGES = "gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"
NEAR = 1 << 34
"""Bytes beside this process's memory in which what it maps later may come to lie."""


def missing() -> str:
    """Return what is to be installed before anything here runs; empty if nothing is."""
    tools = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
    return f"{' and '.join(tools)} not found: apt-get install {PACKAGES}" if tools else ""


def build(folder: Path, root: Path = ROOT, *more: str) -> tuple[Path, Path]:
    """Compile the library of the checkout at `root`, and what calls it, with pyproject.toml's options and `more`."""
    extension = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"][0]
    library, caller = folder / "library.so", folder / "guest"
    options = [*extension["extra-compile-args"], "-Wall", "-Werror", "-fPIC", "-shared", *more]
    libraries = [f"-l{name}" for name in extension["libraries"]]
    subprocess.run([COMPILER, *options, *extension["sources"], *libraries, "-o", library], cwd=root, check=True)
    subprocess.run([COMPILER, "-O2", Path(__file__).with_name("guest.c"), "-ldl", "-o", caller], check=True)
    return library, caller


def _ranges(process: int | str, beside: int = 0) -> list[tuple[int, int]]:
    """Where a process has memory, with so many bytes beside it where it grows: heaps upwards, else downwards."""
    found = []
    for line in Path(f"/proc/{process}/maps").read_text().splitlines():
        begin, end = (int(word, 16) for word in line.split()[0].split("-"))
        if "[heap]" in line:
            found.append((begin, end + beside))
        elif (
            "[" in line
        ):  # the stack and what the kernel puts there; the last is the same in every process, and no memory
            found += [(begin, end)] * ("[vsyscall]" not in line)
        else:
            found.append((begin - beside, end))
    return found


def _overlap(process: int) -> bool:
    """Whether the emulator has memory where this process has some or may get some: addresses are taken as they are."""
    own = _ranges("self", NEAR)
    return any(begin < other_end and other < end for begin, end in _ranges(process) for other, other_end in own)


class _Function:
    """A function of the library with what ctypes has: types of its arguments, and that it can be called."""

    argtypes: Any = ()
    restype: Any = ctypes.c_int

    def __init__(self, guest: Guest, name: str) -> None:
        self._guest, self._name = guest, name

    def __call__(self, *arguments: Any) -> int:
        words = [ctypes.cast(a, ctypes.c_void_p).value or 0 if isinstance(a, bytes) else int(a or 0) for a in arguments]
        result = self._guest.call(self._name, words)
        return ctypes.c_int(result).value if self.restype is ctypes.c_int else result


class Guest:
    """An emulated CPU (a name that qemu knows) that has loaded the library; `isas` are all that it owns up to."""

    def __init__(self, cpu: str, library: Path, caller: Path, isas: tuple[str, ...] = ISAS) -> None:
        command = [EMULATOR, "-L", SYSTEM, "-cpu", cpu, str(caller), str(library)]
        self.isas, self._alone = isas, threading.Lock()
        for _ in range(50):  # where memory lies is drawn anew each time
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._memory = os.open("/proc/self/mem", os.O_RDWR)
            self._answers()
            if not _overlap(self._process.pid):
                return
            self.close()
        raise RuntimeError(
            "the emulator's memory lies where this process has its own: is its place not drawn at random?"
        )

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        os.close(self._memory)

    def __getattr__(self, name: str) -> _Function:
        if not name.startswith("hfa_"):
            raise AttributeError(name)
        function = _Function(self, name)
        setattr(self, name, function)
        return function

    def call(self, name: str, words: list[int]) -> int:
        if name == "hfa_isa_supported" and ISAS[words[0]] not in self.isas:
            return 0
        assert self._process.stdin is not None
        words = [word & (1 << 64) - 1 for word in words] + [0] * (9 - len(words))
        with self._alone:
            self._process.stdin.write(name.encode().ljust(64, b"\0") + struct.pack("<9Q", *words))
            self._process.stdin.flush()
            return self._answers()

    def _answers(self) -> int:
        """Serve pages until the call has ended."""
        assert self._process.stdin is not None
        while True:
            what, address, count = struct.unpack("<3Q", self._read(24))
            if what == ord("D"):
                return ctypes.c_int64(address).value
            if what == ord("R"):
                self._process.stdin.write(os.pread(self._memory, 4096, address))
                self._process.stdin.flush()
            else:
                os.pwrite(self._memory, self._read(count), address)

    def _read(self, count: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(count)
        if len(data) < count:
            raise RuntimeError(f"the emulated process ended with {self._process.wait()}")
        return data
