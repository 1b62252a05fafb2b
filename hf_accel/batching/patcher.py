"""Lets concurrent calls of one model join: its passes run where they meet, or take turns."""

from __future__ import annotations

from typing import Any

from hf_accel.batching.config import BatchingConfig
from hf_accel.batching.engine import Engine
from hf_accel.core.calls.doors import Door
from hf_accel.core.calls.hosting import Host
from hf_accel.core.calls.report import SECTIONS
from hf_accel.core.journal import Journal, beneath, subclass
from hf_accel.core.steps.goal import Goal, Offer
from hf_accel.core.steps.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.core.steps.setting import Setting

SECTIONS["joined_calls"] = "calls that join"


class TakingTurns:
    """Marks a model each of whose passes waits for its turn."""

    _hf_accel_engine: Engine

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ids: Any = kwargs.get("input_ids", args[0] if args else None)
        with self._hf_accel_engine.passing(ids.shape[-1] if hasattr(ids, "shape") and ids.dim() else 0):
            return beneath(TakingTurns, self, "__call__")(*args, **kwargs)


def begin(model: Any, host: Host, config: BatchingConfig, journal: Journal) -> Engine:
    """Let calls of an optimised model join from here on, until the journal is undone."""
    inner = host.doors.get(Door.FORWARD)
    if (share := getattr(inner, "share", None)) is not None:  # a `SharingRunner`
        journal.did(share(config.max_rows, config.max_tokens))
    engine = Engine(model, config, inner)
    before, section = host.doors, host.report.sections.get("joined_calls")
    host.doors = before | {Door.FORWARD: engine, Door.SCHEDULE: engine}
    host.report.sections["joined_calls"] = engine.statistics

    def undo() -> None:
        host.doors = before
        if section is None:
            host.report.sections.pop("joined_calls", None)
        else:
            host.report.sections["joined_calls"] = section

    journal.did(undo)
    journal.swap_class(model, subclass(TakingTurns, type(model), _hf_accel_engine=engine))
    return engine


class BatchingPatcher(Patcher[BatchingConfig], config=BatchingConfig):
    stage = Stage.COMPILATION  # around whatever runs passes
    fidelity = Fidelity.EXACT
    occupies = "running batch"
    needs = ("DecodingConfig",)

    @classmethod
    def candidates(cls, goal: Goal, setting: Setting) -> Offer:
        return Offer()  # whether calls come at once only their maker knows

    def obstacles(self, setting: Setting) -> list[str]:
        return []

    def patch(self, setting: Setting, host: Host) -> Change:
        begin(setting.model, host, self.config, host.journal)
        bound = "" if self.config.latency_ms is None else f", within {self.config.latency_ms:g} ms between tokens"
        return Change(f"concurrent calls run as one batch of up to {self.config.max_rows} rows{bound}")
