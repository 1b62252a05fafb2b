"""Memory for the experts that are used most, of all layers together, within a budget of bytes.

Who leaves is chosen by heat: the rows an expert was sent, halved every so many tokens, which joins frequency and
recency (LRFU; Lee et al. 2001, "LRFU: a spectrum of policies that subsumes the least recently used and least
frequently used policies", IEEE Transactions on Computers 50(12), section 3).
Cost: some 15 µs per call where all experts are there.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from threading import Thread
from time import perf_counter

import numpy as np
import torch

from hf_accel.experts.offload.file import ExpertsFile
from hf_accel.experts.offload.stored import StoredExperts

HALF_LIFE = 32  # tokens after which a row counts half
_LARGEST_GAIN = 1e100
_PER_THREAD = 2 << 20  # bytes: fewer are read before another thread would have begun
_ABSENT, _COMING, _THERE = range(3)


class Slots:
    """The experts in memory. Every method may be called from any thread.

    hits, misses: experts that calls found there, and that had to be read. read_bytes: of these; read_seconds: how long
    that took. held_bytes: of memory that slots take.
    """

    def __init__(self, file: ExpertsFile, stored: Sequence[StoredExperts], budget: int) -> None:
        self.file, self.budget = file, budget
        self.sizes = np.array([size for each in stored for size in each.bytes_of], dtype=np.int64)
        self._owners = [each for each in stored for _ in each.bytes_of]
        count = len(self.sizes)
        self._state = np.zeros(count, dtype=np.int8)
        self._pins = np.zeros(count, dtype=np.int64)
        self._heat = np.zeros(count)
        self._score = np.full(count, np.inf)  # the heat of those that may leave
        self._buffers: dict[int, np.ndarray] = {}
        self._free: dict[int, list[np.ndarray]] = {}
        self._gain, self._growth = 1.0, 2 ** (1 / (HALF_LIFE * len(stored)))
        self._changed = threading.Condition(threading.Lock())
        self.hits = self.misses = self.read_bytes = self.held_bytes = 0
        self.read_seconds = 0.0

    def acquire(self, owner: StoredExperts, experts: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Bring experts of one module into memory and keep them there until `release` of what is returned.

        experts: distinct numbers, together within the budget; rows: how many each is sent.

        Raises:
            StorageError: they cannot be read; nothing is kept.
        """
        wanted = experts + owner.first
        with self._changed:
            self._gain *= self._growth
            if self._gain > _LARGEST_GAIN:
                self._heat /= self._gain
                self._score /= self._gain
                self._gain = 1.0
            self._heat[wanted] += self._gain * rows
        while True:
            with self._changed:
                while (missing := self._claim(wanted)) is None:
                    self._changed.wait()  # others keep too many
                self.hits += len(wanted) - len(missing)
                self.misses += len(missing)
                if not missing and (self._state[wanted] == _THERE).all():
                    return wanted
            try:
                if missing:
                    self._read(missing)
            except BaseException:
                with self._changed:
                    self._give_up(missing)
                    self._unpin(wanted)
                raise
            with self._changed:
                self._state[missing] = _THERE
                self._changed.notify_all()
                while (self._state[wanted] == _COMING).any():  # read by others
                    self._changed.wait()
                if (self._state[wanted] == _THERE).all():
                    return wanted
                self._unpin(wanted)  # what others read failed them: try it here

    def reset(self) -> None:
        """Begin to count anew, with all experts cold."""
        with self._changed:
            self._heat[:] = 0.0
            self._score[self._score < np.inf] = 0.0
            self.hits = self.misses = self.read_bytes = 0
            self.read_seconds = 0.0
            for owner in self._owners:
                owner.kernel.counts.zero_()

    def release(self, kept: np.ndarray) -> None:
        """Let experts leave again."""
        with self._changed:
            self._unpin(kept)

    def _claim(self, wanted: np.ndarray) -> list[int] | None:
        """Pin experts and return those that have to be read into the slots they now have; None: there is no room."""
        self._pins[wanted] += 1
        self._score[wanted] = np.inf
        missing: list[int] = wanted[self._state[wanted] == _ABSENT].tolist()
        taken: list[np.ndarray] = []
        for number in missing:
            buffer = self._room(int(self.sizes[number]))
            if buffer is None:
                for other in taken:
                    self._free.setdefault(len(other), []).append(other)
                self._unpin(wanted)
                return None
            taken.append(buffer)
        for number, buffer in zip(missing, taken, strict=True):
            self._buffers[number] = buffer
            self._state[number] = _COMING
        return missing

    def _room(self, size: int) -> np.ndarray | None:
        """Return memory of a size, for which the coldest experts leave if need be; None if all are in use."""
        while not (fitting := self._free.get(size)):
            if self.held_bytes + size <= self.budget:
                self.held_bytes += size
                return torch.empty(size, dtype=torch.uint8).numpy()  # aligned as vectors want it
            other = next((length for length, free in self._free.items() if free), None)
            if other is not None:
                self._free[other].pop()
                self.held_bytes -= other
                continue
            coldest = int(self._score.argmin())
            if self._score[coldest] == np.inf:
                return None
            self._leave(coldest)
        return fitting.pop()

    def _leave(self, number: int) -> None:
        owner = self._owners[number]
        owner.put(number - owner.first, None)
        self._state[number] = _ABSENT
        self._score[number] = np.inf
        buffer = self._buffers.pop(number)
        self._free.setdefault(len(buffer), []).append(buffer)

    def _read(self, missing: list[int]) -> None:
        began = perf_counter()
        size = int(self.sizes[missing].sum())
        threads = min(torch.get_num_threads(), len(missing), max(size // _PER_THREAD, 1))
        errors: list[BaseException] = []
        others = [Thread(target=self._read_some, args=(missing[i::threads], errors)) for i in range(1, threads)]
        for thread in others:
            thread.start()
        self._read_some(missing[::threads], errors)
        for thread in others:
            thread.join()
        if errors:
            raise errors[0]
        for number in missing:
            owner = self._owners[number]
            owner.put(number - owner.first, self._buffers[number].ctypes.data)
        with self._changed:
            self.read_seconds += perf_counter() - began
            self.read_bytes += size

    def _read_some(self, numbers: list[int], errors: list[BaseException]) -> None:
        try:
            for number in numbers:
                owner = self._owners[number]
                self.file.read(owner.extents[number - owner.first], self._buffers[number].data)
        except BaseException as error:  # it belongs to the thread that waits for all of these
            errors.append(error)

    def _give_up(self, missing: list[int]) -> None:
        for number in missing:
            self._leave(number)

    def _unpin(self, numbers: np.ndarray) -> None:
        self._pins[numbers] -= 1
        unused = numbers[(self._pins[numbers] == 0) & (self._state[numbers] == _THERE)]
        self._score[unused] = self._heat[unused]
        self._changed.notify_all()
