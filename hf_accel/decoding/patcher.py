"""Puts the token loop in place of stock's."""

from __future__ import annotations

from dataclasses import dataclass

from hf_accel.core.calls.hosting import host_of
from hf_accel.core.config import Config
from hf_accel.core.journal import Journal
from hf_accel.core.model.anatomy import Anatomy
from hf_accel.core.steps.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.decoding.loop import TokenLoop


@dataclass(frozen=True, kw_only=True)
class DecodingConfig(Config):
    """Greedy decoding and sampling through a token loop of our own; other strategies stay with stock `generate`."""


class DecodingPatcher(Patcher[DecodingConfig], config=DecodingConfig):
    stage = Stage.DECODING
    fidelity = Fidelity.EXACT
    occupies = "token loop"
    does_equal_work = True

    def obstacles(self, anatomy: Anatomy) -> list[str]:
        return []

    def patch(self, anatomy: Anatomy, journal: Journal) -> Change:
        journal.set_attribute(host_of(anatomy.model), "decoder", TokenLoop())
        return Change("greedy decoding and sampling run in our token loop")
