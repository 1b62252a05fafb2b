"""Puts the token loop in place of stock's."""

from __future__ import annotations

from dataclasses import dataclass

from hf_accel.core.calls.doors import Door
from hf_accel.core.calls.hosting import Host
from hf_accel.core.calls.report import SECTIONS
from hf_accel.core.config import Config
from hf_accel.core.steps.goal import Gain
from hf_accel.core.steps.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.core.steps.setting import Setting
from hf_accel.decoding.loop import TokenLoop
from hf_accel.decoding.rows_left import RowsLeft
from hf_accel.errors import ConfigError

SECTION = "rows_left"


@dataclass(frozen=True, kw_only=True)
class DecodingConfig(Config):
    """Greedy decoding and sampling through a token loop of our own; other strategies stay with stock `generate`.

    rows_leave: whether rows of a batch whose text has ended take no further part in its passes, where that cannot be
        seen and pays; off only for comparison.
    """

    rows_leave: bool = True

    def __post_init__(self) -> None:
        if type(self.rows_leave) is not bool:
            raise ConfigError(f"{type(self).__name__}.rows_leave is True or False; {self.rows_leave!r} was given.")


class DecodingPatcher(Patcher[DecodingConfig], config=DecodingConfig):
    stage = Stage.DECODING
    fidelity = Fidelity.EXACT
    occupies = "token loop"
    gain = Gain.OVERHEAD

    def obstacles(self, setting: Setting) -> list[str]:
        return []

    def patch(self, setting: Setting, host: Host) -> Change:
        rows_left = RowsLeft() if self.config.rows_leave else None
        host.stand(Door.TOKEN_LOOP, TokenLoop(rows_left))
        if rows_left is not None:
            host.report.sections[SECTION] = rows_left
        return Change("greedy decoding and sampling run in our token loop")


SECTIONS[SECTION] = "rows that ended"
