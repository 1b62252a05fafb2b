"""The verb serving: concurrent calls join for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from hf_accel.batching.config import BatchingConfig
from hf_accel.batching.patcher import TakingTurns, begin
from hf_accel.core.calls.doors import Door
from hf_accel.core.calls.hosting import host_of
from hf_accel.core.journal import Journal
from hf_accel.core.model.support import unwrap
from hf_accel.errors import ConfigError, ConflictError

M = TypeVar("M")


@contextmanager
def serving(model: M, config: BatchingConfig | None = None, **fields: Any) -> Iterator[M]:
    """Let concurrent `generate` calls of an optimised model join in one running batch for the length of a `with` block.

    Calls of any threads, and of `agenerate`, become rows of it; each keeps its own arguments, processors, criteria,
    streamer, seed, tenant and cache, and gets the text that it gets alone. What cannot join runs beside the batch, and
    `report(model).joined_calls` counts it with the reason. At the end of the block the model is as it was before it.

    Args:
        model: an optimised model, with its token loop (`DecodingConfig`, as every goal has it).
        config: what may run at once, or the fields of a `BatchingConfig` by name.

    Raises:
        ConflictError: the model is not optimised, or has no token loop, or calls of it join already.
        ConfigError: a field or value that does not exist or does not fit.
    """
    if config is not None and fields:
        raise ConfigError("serving takes a BatchingConfig or its fields, not both.")
    given = BatchingConfig.from_dict(fields) if config is None else config
    if not isinstance(given, BatchingConfig):
        raise ConfigError(f"serving takes a BatchingConfig; {given!r} was given.")
    inner: Any = unwrap(model)
    host = host_of(inner)
    if host is None or Door.TOKEN_LOOP not in host.doors:
        raise ConflictError(
            f"This {type(inner).__name__} is not optimised, or not with its token loop. Call hf_accel.optimize(model) "
            "first: calls join in the loop that it puts in place of stock's."
        )
    if isinstance(inner, TakingTurns):
        raise ConflictError("Calls of this model join already: by a BatchingConfig, or in a block around this one.")
    journal = Journal()
    begin(inner, host, given, journal)
    try:
        yield model
    finally:
        if host_of(inner) is host:  # else it was restored meanwhile, and nothing of this is left
            journal.undo()
