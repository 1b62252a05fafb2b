"""Two buffers through which cache blocks come to the device, one filled by a thread while the other is used.

Cost: two of the largest block on the device (on an accelerator two more in pinned CPU memory if there is a file), and
50 µs per block for handing it over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

import numpy as np
import torch

from hf_accel.cache.tiers.block import Block
from hf_accel.cache.tiers.layout import Layout, Pair, pages
from hf_accel.cache.tiers.spill import Spill


class Slot:
    """A buffer on the device, and the one in CPU memory that a file is read into: the same where that is the device."""

    def __init__(self, device: torch.device, size: int, from_file: bool) -> None:
        is_cuda = device.type == "cuda"
        with torch.inference_mode(False):  # it is written under any mode
            self.on_device = self.on_host = pages(size if device.type == "cpu" else 0)
            if device.type != "cpu":
                self.on_device = torch.empty(size, dtype=torch.uint8, device=device)
                self.on_host = torch.empty(size if from_file else 0, dtype=torch.uint8, pin_memory=is_cuda)
        self.bytes = self.on_host.numpy()
        self._views: dict[Layout, Pair] = {}
        self.loaded = torch.cuda.Event() if is_cuda else None  # after the last copy into it
        self.left = torch.cuda.Event() if is_cuda else None  # after the last use of what it held
        if self.left is not None:
            self.left.record(torch.cuda.current_stream(device))

    def views(self, layout: Layout) -> Pair:
        """Return keys and values on the device."""
        if layout not in self._views:
            with torch.inference_mode(False):  # they stay, and are written under any mode
                self._views[layout] = layout.views(self.on_device)
        return self._views[layout]

    def take_in(self, layout: Layout, keys: torch.Tensor, values: torch.Tensor) -> list[np.ndarray]:
        """Copy tensors into the CPU's buffer; return its parts in the order in which they lie there."""
        if self.loaded is not None:
            self.loaded.synchronize()  # what it held has left it
        for here, given in zip(layout.views(self.on_host), (keys, values)):
            here.copy_(given)
        return layout.parts_of(self.bytes)

    def load(self, block: Block, spill: Spill | None, stream: torch.cuda.Stream | None) -> None:
        """Bring the rows of a block here, on a CUDA device in the order of `stream`. Raises StorageError."""
        if stream is None:
            self._load(block, spill, False)
            return
        self.loaded.synchronize()  # type: ignore[union-attr]  # as in `take_in`
        with torch.cuda.stream(stream):
            stream.wait_event(self.left)  # type: ignore[arg-type]
            self._load(block, spill, True)
            self.loaded.record(stream)  # type: ignore[union-attr]

    def _load(self, block: Block, spill: Spill | None, non_blocking: bool) -> None:
        if block.extent is not None:
            size = block.shown.size
            spill.read(block.extent, block.shown, block.runs, self.bytes)  # type: ignore[union-attr]
            if self.on_host is not self.on_device:
                self.on_device[:size].copy_(self.on_host[:size], non_blocking=non_blocking)
            return
        for here, there in zip(self.views(block.shown), (block.keys, block.values)):
            for row, source, count in block.runs:
                here[row : row + count].copy_(there[source : source + count], non_blocking=non_blocking)  # type: ignore[index]


class Staging:
    """The two slots and the thread. At most one is lent (what was last returned), at most one is filled ahead."""

    def __init__(self, device: torch.device, spill: Spill | None) -> None:
        self.device, self._spill = device, spill
        self.size = 0  # bytes of a slot
        self.asked = self.ready = 0  # blocks that were asked for ahead and then wanted; those there in time
        self._slots: list[Slot] = []
        self._lent: Slot | None = None
        self._ahead: tuple[Block, Slot] | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._results: SimpleQueue[Exception | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def bytes_on_device(self) -> int:
        return 2 * self.size

    @property
    def bytes_on_host(self) -> int:
        """Bytes of the buffers in CPU memory that are not those on the device."""
        return sum(slot.on_host.nbytes for slot in self._slots) if self.device.type != "cpu" else 0

    def resize(self, size: int) -> None:
        """Replace the slots by ones of `size` bytes; what they held is lost."""
        self.forget()
        self._lent = None
        if self._stream is not None:
            self._stream.synchronize()  # the buffers were not made in its order
        self._slots = []
        self.size = size
        self._slots = [Slot(self.device, size, self._spill is not None) for _ in range(2)]

    def load(self, block: Block) -> Pair:
        """Return the rows of a block on the device, valid until the next call. Raises StorageError."""
        self.leave()
        if self._ahead is not None and self._ahead[0] is block:
            slot = self._ahead[1]
            self.asked += 1
            self.ready += not self._results.empty()
            error = self._finish()
            if error is not None:
                raise error
        else:
            if block.extent is not None:
                self.forget()  # the order is another: what was read ahead is not wanted soon
            slot = self.spare()
            if self._stream is not None:
                self._stream.wait_stream(torch.cuda.current_stream(self.device))
            slot.load(block, self._spill, self._stream)
        self._lent = slot
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.loaded)  # type: ignore[arg-type]
        return slot.views(block.shown)

    def leave(self) -> None:
        """What was returned last is not needed any more."""
        if self._lent is not None and self._lent.left is not None:
            self._lent.left.record(torch.cuda.current_stream(self.device))
        self._lent = None

    def spare(self) -> Slot:
        """Return a slot that is not being filled, and not lent if one is not."""
        taken = (self._lent, self._ahead[1] if self._ahead is not None else None)
        free = [slot for slot in self._slots if slot not in taken]
        return free[0] if free else next(slot for slot in self._slots if slot is not taken[1])

    @property
    def is_idle(self) -> bool:
        """Whether nothing is read ahead."""
        return self._ahead is None

    def ask(self, block: Block) -> None:
        """Start to bring a block that will be wanted soon; it must not change before `forget` or `load` of it."""
        self.forget()
        slot = self.spare()
        if self._thread is None:
            # it must not keep what owns it alive: it knows the queues only
            self._thread = threading.Thread(
                target=_serve, args=(self._jobs, self._results), name="hf-accel-prefetch", daemon=True
            )
            self._thread.start()
        self._ahead = (block, slot)
        self._jobs.put(partial(slot.load, block, self._spill, self._stream))

    def forget(self, block: Block | None = None) -> None:
        """Let go of what is read ahead (if it is `block`), once the thread has left it. Call before a block changes."""
        if self._ahead is not None and (block is None or self._ahead[0] is block):
            self._finish()  # an error concerns a block that nobody has asked for

    def close(self) -> None:
        """End the thread and free the slots."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._jobs.put(None)
            if thread is not threading.current_thread():  # where a garbage collection can run
                thread.join()
        if self._stream is not None:
            self._stream.synchronize()
        self._slots, self._lent, self._ahead, self.size = [], None, None, 0

    def _finish(self) -> Exception | None:
        self._ahead = None
        return self._results.get()


def _serve(jobs: SimpleQueue[Callable[[], None] | None], results: SimpleQueue[Exception | None]) -> None:
    """Do one job after the other; None ends it."""
    while (job := jobs.get()) is not None:
        result = None
        try:
            job()
        except Exception as error:
            result = error
        del job  # buffers may be freed as soon as the result is known
        results.put(result)
        del result
