"""Where the blocks of a cache lie that its layers have no room for: the device's memory, the CPU's, a file.

Every step reads all blocks of all layers in order, so the next one on the disk (on a CUDA device also in CPU memory)
is brought while the current one is used. Cost: a step takes as long as reading what is not near, or as computing, if
that is longer; 15 to 60 µs of bookkeeping per block on the disk.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch

from hf_accel.cache.tiers.block import Block
from hf_accel.cache.tiers.layout import Layout, Pair
from hf_accel.cache.tiers.ledger import Ledger
from hf_accel.cache.tiers.placing import Placing
from hf_accel.cache.tiers.spill import Spill
from hf_accel.cache.tiers.staging import Staging
from hf_accel.errors import ConfigError, StorageError


class Tiers:
    """Blocks of keys [B, G, N, Rk] and values [B, G, N, Rv] of any layers, in the order they were put.

    `near_budget_bytes` holds blocks and two buffers of the largest; `cpu_budget_bytes` (None: no limit with
    store="cpu", nothing with store="disk") holds blocks. Neither is exceeded at any moment; on an accelerator two
    buffers in pinned memory come on top where there is a file, as `bytes_held` says. One `generate` call at a time.
    `notes`: sentences about what did not go as planned.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        store: Literal["cpu", "disk"],
        near_budget_bytes: int,
        cpu_budget_bytes: int | None = None,
        folder: Path | str | None = None,
        prefetch: bool = True,
    ) -> None:
        """Raises ConfigError for a store that does not exist or a folder in which no file can be written."""
        if store not in ("cpu", "disk"):
            raise ConfigError(f"store is 'cpu' or 'disk'; {store!r} was given.")
        if cpu_budget_bytes is None and store == "disk":
            cpu_budget_bytes = 0
        self.device, self.store, self.prefetch = torch.device(device), store, prefetch
        self._layers: dict[int, list[Block]] = {}
        self._layouts: dict[tuple, Layout] = {}
        self._spill = Spill(folder) if store == "disk" else None
        self._staging = Staging(self.device, self._spill)
        self._ledger = Ledger(near_budget_bytes, cpu_budget_bytes, self._staging, self._spill)
        self._placing = Placing(self.device, self._ledger, self._staging, self._spill)
        self.peak_bytes, self.notes = self._ledger.peak_bytes, self._placing.notes
        self._close = weakref.finalize(self, _close, self._staging, self._spill)

    def check(self, block_bytes: int) -> None:
        """Raise ConfigError if the near budget cannot hold the buffers for blocks of as many bytes."""
        self._placing.check_buffers(block_bytes)

    def put(self, layer: int, keys: torch.Tensor, values: torch.Tensor, *, owned: bool = False) -> None:
        """Make keys [B, G, N, Rk] and values [B, G, N, Rv] the layer's last block.

        owned: the tensors are the block's from now on and nobody else's; else they are copied.
        Raises ConfigError as `check` does, StorageError if there is no room; then nothing has been put, or lost.
        """
        self._check_open()
        keys, values = keys.detach(), values.detach()
        layout = self._layout(keys, values)
        self._placing.fit_buffers(layout.size, self._layers)
        blocks = self._layers.get(layer, [])
        block = self._placing.place(layout, keys, values, blocks, owned=owned)
        if block is None:
            raise self._ledger.no_room(layer, layout.size)
        if layer not in self._layers:
            self._layers = dict(sorted([*self._layers.items(), (layer, blocks)]))
        blocks.append(block)

    def pop(self, layer: int) -> Pair:
        """Take the layer's last block back, on the device; IndexError if there is none. Raises StorageError."""
        self._check_open()
        blocks = self._layers.get(layer)
        if not blocks:
            raise IndexError(f"layer {layer} has no block to take back")
        block = blocks[-1]
        if block.tier == "near" and block.rows is None:
            pair: Pair = (block.keys, block.values)  # type: ignore[assignment]
        else:
            keys, values = self._bring(block)
            pair = (keys.clone(), values.clone())
        self._placing.forget(blocks.pop())
        return pair

    def read(self, layer: int) -> Iterator[Pair]:
        """Yield every block of a layer in order, on the device, each valid until the next one is asked for.

        One iteration at a time, and no change of the layer meanwhile. Raises StorageError at a block that is damaged.
        """
        self._check_open()
        blocks = self._layers.get(layer, [])
        for index, block in enumerate(blocks):
            pair = self._bring(block)
            if self.prefetch and self._placing.away and self._staging.is_idle:
                self._ask_after(layer, index)
            yield pair
        self._staging.leave()

    def count(self, layer: int) -> int:
        """Return the number of blocks of a layer."""
        return len(self._layers.get(layer, ()))

    def lends(self, layer: int) -> bool:
        """Return whether blocks of a layer are read where they lie, which a choice of their rows would end."""
        return any(block.rows is None and not self._placing.is_away(block) for block in self._layers.get(layer, ()))

    def select(self, layer: int, rows: torch.Tensor) -> None:
        """Let row b of every block of the layer be what row rows[b] was; rows: integers [B'].

        Nothing is moved; the rows are chosen when a block is read. Raises IndexError for a row that does not exist,
        ConfigError and StorageError if blocks of B' rows need larger buffers than there is room for.
        """
        self._check_open()
        blocks = self._layers.get(layer)
        chosen = tuple(rows.tolist())
        if not blocks or chosen == tuple(range(blocks[0].shown.rows)):
            return
        batch = blocks[0].shown.rows
        if not all(0 <= row < batch for row in chosen):
            raise IndexError(f"rows {chosen} of a batch of {batch}")
        maps: dict[tuple[int, ...] | None, tuple[int, ...]] = {None: chosen}
        new: list[tuple[int, ...] | None] = []
        for block in blocks:
            if block.rows not in maps:
                before = block.rows or ()
                maps[block.rows] = tuple(before[row] for row in chosen)
            composed = maps[block.rows]
            new.append(None if composed == tuple(range(block.layout.rows)) else composed)
        self._placing.fit_buffers(max(block.layout.of_rows(len(chosen)).size for block in blocks), self._layers)
        for block, composed_rows in zip(blocks, new):
            self._staging.forget(block)
            block.show(composed_rows)

    def drop(self, layer: int | None = None) -> None:
        """Forget the blocks of a layer, None: of all."""
        for blocks in list(self._layers.values()) if layer is None else [self._layers.get(layer, [])]:
            while blocks:
                self._placing.forget(blocks.pop())

    def bytes_held(self) -> dict[str, int]:
        """Return the bytes in use by tier, buffers included; of the disk what the file takes up."""
        return self._ledger.held()

    def bytes_peak(self) -> dict[str, int]:
        """Return the largest values that `bytes_held` has had."""
        return dict(self.peak_bytes)

    def reads_ahead(self) -> tuple[int, int]:
        """Return how many blocks that were wanted had been asked for ahead, and how many of those were there."""
        return self._staging.asked, self._staging.ready

    def close(self) -> None:
        """Forget everything, close the file and end the thread; also done when collected and at exit."""
        self._layers, self._placing.away = {}, 0
        self._ledger.clear()
        self._close()

    def __enter__(self) -> Tiers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _bring(self, block: Block) -> Pair:
        if block.rows is None and (block.tier == "near" or not self._placing.is_away(block)):
            self._staging.leave()
            return block.keys, block.values  # type: ignore[return-value]
        return self._staging.load(block)

    def _ask_after(self, layer: int, index: int) -> None:
        """Ask for the next block that is away: of the layer, or of those that follow, the first after the last."""
        names = list(self._layers)
        at = names.index(layer)
        for block in self._layers[layer][index + 1 :]:
            if self._placing.is_away(block):
                return self._staging.ask(block)
        for name in names[at + 1 :] + names[: at + 1]:
            for block in self._layers[name]:
                if self._placing.is_away(block):
                    return self._staging.ask(block)

    def _layout(self, keys: torch.Tensor, values: torch.Tensor) -> Layout:
        kind = (keys.shape, values.shape, keys.dtype, values.dtype)
        if kind not in self._layouts:
            if keys.dim() != 4 or keys.shape[:3] != values.shape[:3] or keys.numel() == 0 or values.numel() == 0:
                raise ConfigError(
                    "a block needs keys and values of the same rows, heads and tokens, at least one of each; "
                    f"keys {tuple(keys.shape)} and values {tuple(values.shape)} were given."
                )
            self._layouts[kind] = Layout(keys.shape, values.shape, (keys.dtype, values.dtype))
        return self._layouts[kind]

    def _check_open(self) -> None:
        if not self._close.alive:
            raise StorageError("these tiers are closed: nothing can be put there or read any more.")


def _close(staging: Staging, spill: Spill | None) -> None:
    staging.close()
    if spill is not None:
        spill.close()
