"""Puts the token loop in place of stock's."""

from __future__ import annotations

from dataclasses import dataclass

from hf_accel.core.calls.doors import Door
from hf_accel.core.calls.hosting import Host
from hf_accel.core.config import Config
from hf_accel.core.steps.goal import Gain
from hf_accel.core.steps.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.core.steps.setting import Setting
from hf_accel.decoding.loop import TokenLoop


@dataclass(frozen=True, kw_only=True)
class DecodingConfig(Config):
    """Greedy decoding and sampling through a token loop of our own; other strategies stay with stock `generate`."""


class DecodingPatcher(Patcher[DecodingConfig], config=DecodingConfig):
    stage = Stage.DECODING
    fidelity = Fidelity.EXACT
    occupies = "token loop"
    gain = Gain.OVERHEAD

    def obstacles(self, setting: Setting) -> list[str]:
        return []

    def patch(self, setting: Setting, host: Host) -> Change:
        host.stand(Door.TOKEN_LOOP, TokenLoop())
        return Change("greedy decoding and sampling run in our token loop")
