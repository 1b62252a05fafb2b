"""How many bytes blocks take in each tier, how many they may take, and the most that there were at any moment."""

from __future__ import annotations

from hf_accel.cache.tiers.spill import Spill
from hf_accel.cache.tiers.staging import Staging
from hf_accel.errors import ConfigError, StorageError


class Ledger:
    """Bytes of blocks near (in the device's memory) and in the CPU's, of the buffers for reading, and of the file.

    peak_bytes: the largest values that `held` has had, by tier, as it goes on.
    """

    def __init__(self, near_budget: int, cpu_budget: int | None, staging: Staging, spill: Spill | None) -> None:
        """A budget of None has no limit."""
        self.near_budget = near_budget
        self._budgets = {"near": near_budget, "cpu": cpu_budget}
        self._used = {"near": 0, "cpu": 0}
        self._staging, self._spill = staging, spill
        self.peak_bytes = {"near": 0, "cpu": 0, "disk": 0}

    def check_buffers(self, block_bytes: int) -> None:
        """Raise ConfigError if the near budget cannot hold the two buffers for blocks of as many bytes."""
        need = 2 * block_bytes
        if need > self.near_budget:
            raise ConfigError(
                f"a near budget of {self.near_budget} bytes: blocks of {block_bytes} bytes need two buffers, "
                f"{need} bytes. Raise the budget to that or more, or make the blocks or the batch smaller."
            )

    def has_room(self, tier: str, size: int) -> bool:
        """Return whether `size` more bytes fit into the budget of a tier."""
        budget = self._budgets[tier]
        buffers = self._staging.bytes_on_device if tier == "near" else 0
        return budget is None or self._used[tier] + buffers + size <= budget

    def move(self, size: int, before: str, after: str) -> None:
        """Count a block of `size` bytes in tier `after` instead of `before` ('': in none)."""
        if before in self._used:
            self._used[before] -= size
        if after in self._used:
            self._used[after] += size
        self.note_peak()

    def clear(self) -> None:
        """Forget all blocks."""
        self._used = {"near": 0, "cpu": 0}

    def held(self) -> dict[str, int]:
        """Return the bytes in use by tier, buffers included; of the disk what the file takes up."""
        return {
            "near": self._used["near"] + self._staging.bytes_on_device,
            "cpu": self._used["cpu"] + self._staging.bytes_on_host,
            "disk": 0 if self._spill is None else self._spill.size,
        }

    def note_peak(self) -> None:
        """Take what is held into the peaks."""
        for tier, held in self.held().items():
            self.peak_bytes[tier] = max(self.peak_bytes[tier], held)

    def no_room(self, layer: int, size: int) -> StorageError:
        """Return the error for a block that fits nowhere."""
        held = self.held()
        full = [f"near memory holds {held['near']} of {self.near_budget} bytes"]
        full.append(f"CPU memory {held['cpu']} of {self._budgets['cpu']}")
        if self._spill is not None:
            full.append(self._spill.full)
        cure = "name a folder on a larger disk" if self._spill is not None else 'choose store="disk"'
        return StorageError(
            f"no room for a cache block of {size} bytes of layer {layer}: {', '.join(full)}. Everything put before is "
            f"kept. Raise the budgets, {cure}, or generate fewer tokens."
        )
