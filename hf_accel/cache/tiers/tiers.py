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

from hf_accel.cache.tiers.spill import Layout, Spill
from hf_accel.cache.tiers.staging import Block, Pair, Staging
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
            raise ConfigError(f"store={store!r}: there are 'cpu' and 'disk'.")
        if cpu_budget_bytes is None and store == "disk":
            cpu_budget_bytes = 0
        self.device, self.store, self.prefetch = torch.device(device), store, prefetch
        self.notes: list[str] = []
        self._budgets = {"near": near_budget_bytes, "cpu": cpu_budget_bytes}
        self._used = {"near": 0, "cpu": 0}
        self.peak_bytes = {"near": 0, "cpu": 0, "disk": 0}  # the largest that `bytes_held` has been, as it goes on
        self._largest = 0
        self._layers: dict[int, list[Block]] = {}
        self._away = 0  # blocks that are worth bringing ahead
        self._layouts: dict[tuple, Layout] = {}
        self._spill = Spill(folder) if store == "disk" else None
        self._staging = Staging(self.device, self._spill)
        self._close = weakref.finalize(self, _close, self._staging, self._spill)

    def check(self, block_bytes: int) -> None:
        """Raise ConfigError if the near budget cannot hold the buffers for blocks of as many bytes."""
        need = 2 * block_bytes
        if need > self._budgets["near"]:  # type: ignore[operator]
            raise ConfigError(
                f"a near budget of {self._budgets['near']} bytes: blocks of {block_bytes} bytes need two buffers, "
                f"{need} bytes. Raise the budget to that or more, or make the blocks or the batch smaller."
            )
        self._largest = max(self._largest, block_bytes)

    def put(self, layer: int, keys: torch.Tensor, values: torch.Tensor, *, owned: bool = False) -> None:
        """Make keys [B, G, N, Rk] and values [B, G, N, Rv] the layer's last block.

        owned: the tensors are the block's from now on and nobody else's; else they are copied.
        Raises ConfigError as `check` does, StorageError if there is no room; then nothing has been put, or lost.
        """
        self._check_open()
        keys, values = keys.detach(), values.detach()
        layout = self._layout(keys, values)
        self._fit(layout.size)
        blocks = self._layers.get(layer, [])
        spare = self._clear_near(blocks, layout)
        block = Block(layout)
        if self._has_room("near", layout.size) or self._has_room("cpu", layout.size):
            tier = "near" if self._has_room("near", layout.size) else "cpu"
            if owned and self._can_adopt(keys, values, tier):
                spare = None
                block.keys, block.values = keys, values
            else:
                block.keys, block.values = spare if spare and tier == "near" else self._empty(layout, tier)
                block.keys.copy_(keys)
                block.values.copy_(values)
            self._settle(block, tier)
        else:
            spare = None
            block.keys, block.values = keys, values
            if not self._to_disk(block):
                raise self._no_room(layer, layout.size)
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
        self._forget(blocks.pop())
        return pair

    def read(self, layer: int) -> Iterator[Pair]:
        """Yield every block of a layer in order, on the device, each valid until the next one is asked for.

        One iteration at a time, and no change of the layer meanwhile. Raises StorageError at a block that is damaged.
        """
        self._check_open()
        blocks = self._layers.get(layer, [])
        for index, block in enumerate(blocks):
            pair = self._bring(block)
            if self.prefetch and self._away and self._staging.is_idle:
                self._ask_after(layer, index)
            yield pair
        self._staging.leave()

    def count(self, layer: int) -> int:
        """Return the number of blocks of a layer."""
        return len(self._layers.get(layer, ()))

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
        self._fit(max(block.layout.of_rows(len(chosen)).size for block in blocks))
        for block, composed_rows in zip(blocks, new):
            self._staging.forget(block)
            block.show(composed_rows)

    def drop(self, layer: int | None = None) -> None:
        """Forget the blocks of a layer, None: of all."""
        for blocks in list(self._layers.values()) if layer is None else [self._layers.get(layer, [])]:
            while blocks:
                self._forget(blocks.pop())

    def bytes_held(self) -> dict[str, int]:
        """Return the bytes in use by tier, buffers included; of the disk what the file takes up."""
        return {
            "near": self._used["near"] + self._staging.bytes_on_device,
            "cpu": self._used["cpu"] + self._staging.bytes_on_host,
            "disk": 0 if self._spill is None else self._spill.size,
        }

    def bytes_peak(self) -> dict[str, int]:
        """Return the largest values that `bytes_held` has had."""
        return dict(self.peak_bytes)

    def reads_ahead(self) -> tuple[int, int]:
        """Return how many blocks that were wanted had been asked for ahead, and how many of those were there."""
        return self._staging.asked, self._staging.ready

    def close(self) -> None:
        """Forget everything, close the file and end the thread; also done when collected and at exit."""
        self._layers, self._used, self._away = {}, {"near": 0, "cpu": 0}, 0
        self._close()

    def __enter__(self) -> Tiers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- reading

    def _bring(self, block: Block) -> Pair:
        if block.rows is None and (block.tier == "near" or not self._is_away(block)):
            self._staging.leave()
            return block.keys, block.values  # type: ignore[return-value]
        return self._staging.load(block)

    def _ask_after(self, layer: int, index: int) -> None:
        """Ask for the next block that is away: of the layer, or of those that follow, the first after the last."""
        names = list(self._layers)
        at = names.index(layer)
        for block in self._layers[layer][index + 1 :]:
            if self._is_away(block):
                return self._staging.ask(block)
        for name in names[at + 1 :] + names[: at + 1]:
            for block in self._layers[name]:
                if self._is_away(block):
                    return self._staging.ask(block)

    def _is_away(self, block: Block) -> bool:
        return block.tier == "disk" or (block.tier == "cpu" and self.device.type != "cpu")

    # ---- placing

    def _has_room(self, tier: str, size: int) -> bool:
        budget = self._budgets[tier]
        buffers = self._staging.bytes_on_device if tier == "near" else 0
        return budget is None or self._used[tier] + buffers + size <= budget

    def _fit(self, size: int) -> None:
        """Make the buffers large enough for blocks of `size` bytes, moving blocks from near where they need room."""
        if size <= self._staging.size:
            return
        self.check(size)
        size = self._largest
        while not self._has_room("near", 2 * (size - self._staging.size)):
            # of the layer that holds most; all of them would do, as two buffers fit
            held = {
                layer: sum(block.layout.size for block in blocks if block.tier == "near")
                for layer, blocks in self._layers.items()
            }
            layer = max(held, key=lambda name: held[name])
            blocks = self._layers[layer]
            oldest = next(block for block in blocks if block.tier == "near")
            if not self._lower(oldest, blocks):
                raise self._no_room(layer, oldest.layout.size)
        self._staging.resize(size)
        self._note_peak()

    def _clear_near(self, blocks: list[Block], layout: Layout) -> Pair | None:
        """Move the oldest near blocks of a layer down until one of `layout` has room; return memory left for it."""
        spare: Pair | None = None
        if self._has_room("near", layout.size):
            return None
        near = [block for block in blocks if block.tier == "near"]
        if not self._has_room("near", layout.size - sum(block.layout.size for block in near)):
            return None
        for block in near:
            spare = None
            keys, values = block.keys, block.values
            if not self._lower(block, blocks):
                return None
            if block.layout is layout and block.keys is not keys and not keys.is_inference():  # type: ignore[union-attr]
                spare = (keys, values)  # type: ignore[assignment]
            del keys, values
            if self._has_room("near", layout.size):
                break
        return spare

    def _lower(self, block: Block, blocks: list[Block]) -> bool:
        """Move a near block of a layer to CPU memory, or else to the disk; False: neither has room."""
        size = block.layout.size
        if not self._has_room("cpu", size) and self._spill is not None:
            held = [other for other in blocks if other.tier == "cpu"]
            if self._has_room("cpu", size - sum(other.layout.size for other in held)):
                for other in held:
                    if self._has_room("cpu", size) or not self._to_disk(other):
                        break
        if not self._has_room("cpu", size):
            return self._to_disk(block)
        if self.device.type != "cpu":
            keys, values = self._empty(block.layout, "cpu")
            keys.copy_(block.keys)  # type: ignore[arg-type]
            values.copy_(block.values)  # type: ignore[arg-type]
            block.keys, block.values = keys, values
        self._settle(block, "cpu")
        return True

    def _to_disk(self, block: Block) -> bool:
        """Write a block from the memory it is in; False: there is no file or no room."""
        if self._spill is None:
            return False
        self._staging.forget(block)
        keys, values = block.keys, block.values
        if all(part.device.type == "cpu" and part.is_contiguous() for part in (keys, values)):  # type: ignore[union-attr]
            parts = block.layout.bytes_of(keys, values)  # type: ignore[arg-type]
        else:
            parts = self._staging.spare().take_in(block.layout, keys, values)  # type: ignore[arg-type]
        record = self._spill.write(block.layout, parts)
        if record is None:
            note = f"{self._spill.full}; blocks stay in memory while there is room."
            if note not in self.notes:
                self.notes.append(note)
            return False
        block.keys, block.values, block.record = None, None, record
        self._settle(block, "disk")
        return True

    def _settle(self, block: Block, tier: str) -> None:
        """Count a block in another tier ('': in none)."""
        self._away -= self._is_away(block)
        if block.tier in self._used:
            self._used[block.tier] -= block.layout.size
        block.tier = tier
        if tier in self._used:
            self._used[tier] += block.layout.size
        self._away += self._is_away(block)
        self._note_peak()

    def _forget(self, block: Block) -> None:
        self._staging.forget(block)
        if block.record is not None and self._spill is not None:
            self._spill.free(block.record)
        block.keys = block.values = block.record = None
        self._settle(block, "")

    def _note_peak(self) -> None:
        for tier, held in self.bytes_held().items():
            self.peak_bytes[tier] = max(self.peak_bytes[tier], held)

    # ---- memory

    def _layout(self, keys: torch.Tensor, values: torch.Tensor) -> Layout:
        kind = (keys.shape, values.shape, keys.dtype, values.dtype)
        if kind not in self._layouts:
            if keys.dim() != 4 or keys.shape[:3] != values.shape[:3] or keys.numel() == 0 or values.numel() == 0:
                raise ConfigError(f"a block of keys {tuple(keys.shape)} and values {tuple(values.shape)}.")
            self._layouts[kind] = Layout(keys.shape, values.shape, (keys.dtype, values.dtype))
        return self._layouts[kind]

    def _empty(self, layout: Layout, tier: str) -> Pair:
        with torch.inference_mode(False):  # written again under any mode
            pinned = tier == "cpu" and self.device.type == "cuda"
            device = self.device if tier == "near" else torch.device("cpu")
            return layout.empty(device, pinned)

    def _can_adopt(self, keys: torch.Tensor, values: torch.Tensor, tier: str) -> bool:
        """Whether tensors can be a block as they are: where it belongs, contiguous, and all of their memory."""
        return (tier == "near" or self.device.type == "cpu") and all(
            part.device.type == self.device.type
            and part.is_contiguous()
            and part.untyped_storage().nbytes() == part.nbytes
            for part in (keys, values)
        )

    def _no_room(self, layer: int, size: int) -> StorageError:
        held = self.bytes_held()
        full = [f"near memory holds {held['near']} of {self._budgets['near']} bytes"]
        full.append(f"CPU memory {held['cpu']} of {self._budgets['cpu']}")
        if self._spill is not None:
            full.append(self._spill.full)
        cure = "name a folder on a larger disk" if self._spill is not None else 'choose store="disk"'
        return StorageError(
            f"no room for a cache block of {size} bytes of layer {layer}: {', '.join(full)}. Everything put before is "
            f"kept. Raise the budgets, {cure}, or generate fewer tokens."
        )

    def _check_open(self) -> None:
        if not self._close.alive:
            raise StorageError("these tiers are closed: nothing can be put there or read any more.")


def _close(staging: Staging, spill: Spill | None) -> None:
    staging.close()
    if spill is not None:
        spill.close()
