"""In which tier a block lies: as near as the budgets allow, and the oldest blocks of a layer move down first."""

from __future__ import annotations

import torch

from hf_accel.cache.tiers.block import Block
from hf_accel.cache.tiers.layout import Layout, Pair
from hf_accel.cache.tiers.ledger import Ledger
from hf_accel.cache.tiers.spill import Spill
from hf_accel.cache.tiers.staging import Staging


class Placing:
    """Puts blocks into tiers and moves them down.

    away: how many blocks are worth bringing ahead. notes: sentences about what did not go as planned.
    """

    def __init__(self, device: torch.device, ledger: Ledger, staging: Staging, spill: Spill | None) -> None:
        self.device, self._ledger, self._staging, self._spill = device, ledger, staging, spill
        self.away = 0
        self.notes: list[str] = []
        self._largest = 0  # bytes of a block, so far

    def is_away(self, block: Block) -> bool:
        """Return whether a block has to be read or copied to come to the device."""
        return block.tier == "disk" or (block.tier == "cpu" and self.device.type != "cpu")

    def check_buffers(self, block_bytes: int) -> None:
        """Raise ConfigError if the near budget cannot hold the buffers for blocks of as many bytes."""
        self._ledger.check_buffers(block_bytes)
        self._largest = max(self._largest, block_bytes)

    def fit_buffers(self, size: int, layers: dict[int, list[Block]]) -> None:
        """Make the buffers large enough for blocks of `size` bytes, moving blocks from near where they need room.

        Raises ConfigError as `check_buffers` does, StorageError if those blocks fit nowhere.
        """
        if size <= self._staging.size:
            return
        self.check_buffers(size)
        size = self._largest
        while not self._ledger.has_room("near", 2 * (size - self._staging.size)):
            # of the layer that holds most; all of them would do, as two buffers fit
            near = {
                layer: sum(block.layout.size for block in blocks if block.tier == "near")
                for layer, blocks in layers.items()
            }
            layer = max(near, key=lambda name: near[name])
            oldest = next(block for block in layers[layer] if block.tier == "near")
            if not self._lower(oldest, layers[layer]):
                raise self._ledger.no_room(layer, oldest.layout.size)
        self._staging.resize(size)
        self._ledger.note_peak()

    def place(
        self, layout: Layout, keys: torch.Tensor, values: torch.Tensor, blocks: list[Block], *, owned: bool
    ) -> Block | None:
        """Return a new block of a layer, beside the layer's `blocks`, or None if it fits nowhere.

        owned: the tensors may become the block's; else they are copied.
        """
        spare = self._clear_near(blocks, layout)
        block = Block(layout)
        tier = next((tier for tier in ("near", "cpu") if self._ledger.has_room(tier, layout.size)), None)
        if tier is None:
            spare = None
            block.keys, block.values = keys, values
            return block if self._to_disk(block) else None
        if owned and self._can_adopt(keys, values, tier):
            spare = None
            block.keys, block.values = keys, values
        else:
            block.keys, block.values = spare if spare and tier == "near" else self._empty(layout, tier)
            block.keys.copy_(keys)
            block.values.copy_(values)
        self._settle(block, tier)
        return block

    def forget(self, block: Block) -> None:
        """Give up what a block holds."""
        self._staging.forget(block)
        if block.extent is not None and self._spill is not None:
            self._spill.free(block.extent)
        block.keys = block.values = block.extent = None
        self._settle(block, "")

    def _clear_near(self, blocks: list[Block], layout: Layout) -> Pair | None:
        """Move the oldest near blocks of a layer down until one of `layout` has room; return memory left for it."""
        has_room, spare = self._ledger.has_room, None
        if has_room("near", layout.size):
            return None
        near = [block for block in blocks if block.tier == "near"]
        if not has_room("near", layout.size - sum(block.layout.size for block in near)):
            return None
        for block in near:
            spare = None
            keys, values = block.keys, block.values
            if not self._lower(block, blocks):
                return None
            if block.layout is layout and block.keys is not keys and not keys.is_inference():  # type: ignore[union-attr]
                spare = keys, values
            del keys, values
            if has_room("near", layout.size):
                break
        return spare  # type: ignore[return-value]

    def _lower(self, block: Block, blocks: list[Block]) -> bool:
        """Move a near block of a layer to CPU memory, or else to the disk; False: neither has room."""
        size, has_room = block.layout.size, self._ledger.has_room
        if not has_room("cpu", size) and self._spill is not None:
            in_cpu = [other for other in blocks if other.tier == "cpu"]
            if has_room("cpu", size - sum(other.layout.size for other in in_cpu)):
                for other in in_cpu:
                    if has_room("cpu", size) or not self._to_disk(other):
                        break
        if not has_room("cpu", size):
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
        extent = self._spill.write(block.layout, parts)
        if extent is None:
            note = f"{self._spill.full}; blocks stay in memory while there is room."
            if note not in self.notes:
                self.notes.append(note)
            return False
        block.keys, block.values, block.extent = None, None, extent
        self._settle(block, "disk")
        return True

    def _settle(self, block: Block, tier: str) -> None:
        """Count a block in another tier ('': in none)."""
        self.away -= self.is_away(block)
        before, block.tier = block.tier, tier
        self.away += self.is_away(block)
        self._ledger.move(block.layout.size, before, tier)

    def _empty(self, layout: Layout, tier: str) -> Pair:
        with torch.inference_mode(False):  # written again under any mode
            pinned = tier == "cpu" and self.device.type == "cuda"
            device = self.device if tier == "near" else torch.device("cpu")
            return layout.empty(device, pinned)

    def _can_adopt(self, keys: torch.Tensor, values: torch.Tensor, tier: str) -> bool:
        """Return whether tensors can be a block as they are: where it belongs, contiguous, and all of their memory."""
        return (tier == "near" or self.device.type == "cpu") and all(
            part.device.type == self.device.type
            and part.is_contiguous()
            and part.untyped_storage().nbytes() == part.nbytes
            for part in (keys, values)
        )
