"""What may run at once, and what those who run are promised."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hf_accel.core.config import Config
from hf_accel.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BatchingConfig(Config):
    """Concurrent `generate` calls become the rows of one running batch (see docs/batching.md).

    max_rows: the most rows that run at once; further calls wait, first come first served.
    max_wait_ms: how long a step waits for the rows that are still at their processors, criteria and streamers.
    max_tokens: the most positions that all caches together may come to hold, prompts and new tokens; None: no bound.
    chunk_tokens: how many tokens of a prompt are read between two steps of others; 0: prompts are read whole.
    latency_ms: the time between two tokens of a call that is aimed at: as many rows run, and as long chunks of prompts
        are read, as measured times allow. None: the most tokens of all calls together.
    """

    max_rows: int = 32
    max_wait_ms: float = 5.0
    max_tokens: int | None = None
    chunk_tokens: int = 128
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        self.check_integer("max_rows", 1)
        self.check_integer("chunk_tokens", 0)
        if self.max_tokens is not None:
            self.check_integer("max_tokens", 1)
        self._check_time("max_wait_ms", 0.0)
        if self.latency_ms is not None:
            self._check_time("latency_ms", 0.001)

    def _check_time(self, name: str, least: float) -> None:
        value = getattr(self, name)
        if type(value) not in (int, float) or not math.isfinite(value) or value < least:
            raise ConfigError(f"{type(self).__name__}.{name} is a time in ms, at least {least}; {value!r} was given.")
