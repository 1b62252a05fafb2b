"""What a key/value cache keeps, how, where, and for how long."""

from __future__ import annotations

from dataclasses import dataclass

from hf_accel.cache.eviction import METHODS
from hf_accel.core.config import Config
from hf_accel.errors import ConfigError
from hf_accel.ops.cached import BITS

STORES = ("device", "cpu", "disk")


@dataclass(frozen=True, kw_only=True)
class KVCacheConfig(Config):
    """A key/value cache that appends in place. Everything else is off unless asked for.

    `bits` goes with all else; of a `store` other than "device", an `eviction` or `window`, and `prefix_reuse` only one.

    bits: None keeps keys and values as they are; 8 or 4 keeps codes with a scale per token and head, which attention
        reads as they are. Lossy: see docs/cache.md for what it costs in perplexity.
    from_tokens: with `bits`, calls whose prompt and new tokens together are fewer keep keys and values as they are;
        below some length codes gain nothing, see `hf_accel.measure.break_even`.
    store: where what `device_budget_bytes` has no room for goes: "device" (nowhere; the budgets do not apply), "cpu"
        (CPU memory, pinned beside a CUDA device) or "disk" (CPU memory up to `cpu_budget_bytes`, then an unnamed file).
    device_budget_bytes: bytes on the model's device for all layers, buffers included. None: as few as will do.
    cpu_budget_bytes: bytes of CPU memory beside that. None: no limit for "cpu", none at all for "disk". For a model on
        the CPU both budgets are of the same memory, and together they are what the cache may hold of it.
    folder: where the file of "disk" lies, which has no name and leaves nothing behind; None: the temporary folder.
    prefetch: whether a thread brings the next block while one is used; off only for comparison.
    eviction: which positions are given up, per row and kv head. Lossy. None with a `window`: "streaming".
    window: the latest tokens, all of them kept. None with an `eviction`: 32. They keep the positions they had.
    sinks: first tokens of every row that are always kept, after its padding.
    kept_tokens: with "snapkv", "h2o", "tova" and "key-norm", how many tokens are kept, sinks and window included.
    prefix_reuse: whether prompts that begin like earlier ones of the same tenant take over their keys and values.
    prefix_budget_bytes: memory that these may take, for all tenants.
    prefix_folder: where they are kept on the disk, too, for later processes; None: they are not.
    """

    bits: int | None = None
    from_tokens: int = 0
    store: str = "device"
    device_budget_bytes: int | None = None
    cpu_budget_bytes: int | None = None
    folder: str | None = None
    prefetch: bool = True
    eviction: str | None = None
    window: int | None = None
    sinks: int = 0
    kept_tokens: int | None = None
    prefix_reuse: bool = False
    prefix_budget_bytes: int = 1 << 28
    prefix_folder: str | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.bits is not None and (type(self.bits) is not int or self.bits not in BITS):
            raise ConfigError(f"{name}.bits is None, 8 or 4; {self.bits!r} was given.")
        if self.store not in STORES:
            raise ConfigError(f"{name}.store is one of {', '.join(STORES)}; {self.store!r} was given.")
        self.check_integer("from_tokens", 0)
        self.check_integer("sinks", 0)
        self.check_integer("prefix_budget_bytes", 1)
        for field, lowest in (("device_budget_bytes", 1), ("cpu_budget_bytes", 0), ("window", 1), ("kept_tokens", 1)):
            if getattr(self, field) is not None:
                self.check_integer(field, lowest)
        for field in ("prefix_reuse", "prefetch"):
            if type(getattr(self, field)) is not bool:
                raise ConfigError(f"{name}.{field} is True or False; {getattr(self, field)!r} was given.")
        for field in ("folder", "prefix_folder"):
            if not isinstance(getattr(self, field), str | None):
                raise ConfigError(f"{name}.{field} is a path as a string; {getattr(self, field)!r} was given.")
        self._check_together()

    def _check_together(self) -> None:
        name = type(self).__name__
        if self.store == "device":
            given = [f for f in ("device_budget_bytes", "cpu_budget_bytes") if getattr(self, f) is not None]
            if given:
                raise ConfigError(f'{name}.{given[0]} needs somewhere to move blocks to: store="cpu" or store="disk".')
        if self.folder is not None and self.store != "disk":
            raise ConfigError(f'{name}.folder is for store="disk"; for prefixes there is prefix_folder.')
        if self.prefix_folder is not None and not self.prefix_reuse:
            raise ConfigError(f"{name}.prefix_folder needs prefix_reuse=True.")
        if self.prefix_reuse and self.store != "device":
            raise ConfigError(f'{name}: prefix_reuse is for store="device"; blocks that have moved out are not kept.')
        if self.from_tokens and self.bits is None:
            raise ConfigError(f"{name}.from_tokens says from how many tokens on bits are used; give bits, too.")
        if self.eviction is not None and self.eviction not in METHODS:
            raise ConfigError(f"{name}.eviction is one of {', '.join(METHODS)}; {self.eviction!r} was given.")
        if self.method is None:
            if self.sinks or self.kept_tokens is not None:
                raise ConfigError(f"{name}: sinks and kept_tokens need a window or an eviction.")
            return
        if self.eviction == "streaming" and self.window is None:
            raise ConfigError(f'{name}: eviction="streaming" keeps a window of the latest tokens; give window=.')
        if self.method == "streaming":
            if self.kept_tokens is not None:
                raise ConfigError(f"{name}: streaming keeps sinks + window tokens; kept_tokens is for other evictions.")
        elif self.kept_tokens is None or self.kept_tokens <= self.sinks + self.recent:
            raise ConfigError(
                f"{name}: eviction={self.eviction!r} needs kept_tokens above sinks + window = "
                f"{self.sinks + self.recent}; {self.kept_tokens!r} was given."
            )
        if self.store != "device":
            raise ConfigError(f'{name}: what eviction leaves fits the device; use it with store="device".')
        if self.prefix_reuse:
            raise ConfigError(f"{name}: prefixes are whole; prefix_reuse and eviction exclude each other.")

    @property
    def method(self) -> str | None:
        """The eviction method, None where nothing is given up."""
        return "streaming" if self.eviction is None and self.window is not None else self.eviction

    @property
    def recent(self) -> int:
        return 32 if self.window is None else self.window

    @property
    def capacity(self) -> int:
        """Tokens of a row that eviction leaves."""
        return self.sinks + self.recent if self.kept_tokens is None else self.kept_tokens

    @property
    def is_lossy(self) -> bool:
        return self.bits is not None or self.method is not None
