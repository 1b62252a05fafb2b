"""What the benchmark measured: times of both states round by round, ratios, bytes, and everything to read them by."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from hf_accel.core.calls.report import Report
from hf_accel.measure.difference import Difference
from hf_accel.measure.latency import Run, Timing
from hf_accel.measure.machine import Machine
from hf_accel.measure.overhead import CallCost
from hf_accel.measure.workload import Workload

QUANTITIES = ("prefill", "token", "median_token", "whole", "one_token_call", "fixed")  # the timings of a Side
DISTURBED = 0.2  # spread, or distance of mean and median token, above which a measurement is better repeated


@dataclass(frozen=True)
class Sample:
    """What one round measured of one state."""

    run: Run
    costs: list[CallCost]
    resident_bytes: int | None


@dataclass
class Side:
    """The measurements of one state of the model, one value per round."""

    prefill: Timing = field(default_factory=Timing)
    token: Timing = field(default_factory=Timing)  # mean of the tokens after the first
    median_token: Timing = field(default_factory=Timing)
    whole: Timing = field(default_factory=Timing)
    one_token_call: Timing = field(default_factory=Timing)
    fixed: Timing = field(default_factory=Timing)
    resident_bytes: list[int] = field(default_factory=list)  # after generating; empty without psutil

    def add(self, sample: Sample) -> None:
        run, costs = sample.run, sample.costs
        self.prefill.seconds.append(run.prefill_s)
        self.token.seconds.append(statistics.fmean(run.tokens_s))
        self.median_token.seconds.append(statistics.median(run.tokens_s))
        self.whole.seconds.append(run.prefill_s + sum(run.tokens_s))
        self.one_token_call.seconds.append(statistics.median(cost.whole_s for cost in costs))
        self.fixed.seconds.append(statistics.median(cost.fixed_s for cost in costs))
        if sample.resident_bytes is not None:
            self.resident_bytes.append(sample.resident_bytes)

    @property
    def is_disturbed(self) -> bool:
        """Whether other programs seem to have taken much of the time."""
        return self.token.spread > DISTURBED or abs(self.token.median / self.median_token.median - 1) > DISTURBED


@dataclass
class Bench:
    """The result: measurements of both states and everything needed to read them."""

    model: str
    dtype: str
    workload: Workload
    weight_bytes: int
    read_bytes: dict[str, int]  # state -> bytes of weights that a token reads
    read_bandwidth_bytes_per_s: float
    stock: Side
    patched: Side
    stock_ids: torch.Tensor  # [B, S]
    patched_ids: torch.Tensor
    difference: Difference | None
    report: Report
    machine: Machine
    versions: dict[str, str]
    date: str

    @property
    def rounds(self) -> int:
        """The rounds that were made; fewer than asked for if the time was up."""
        return len(self.stock.token.seconds)

    @property
    def is_disturbed(self) -> bool:
        """Whether the measurement is better repeated on a quieter machine."""
        if self.speculates:  # tokens arrive several at once: mean and median are apart by nature
            return self.stock.is_disturbed or self.patched.token.spread > DISTURBED
        return self.stock.is_disturbed or self.patched.is_disturbed

    @property
    def speculates(self) -> bool:
        """Whether the patched model wrote several tokens in some of its steps; they share a reading of the weights."""
        counts = self.report.speculation
        return counts is not None and any(counts.to_dict()["accepted"].values())

    def achieved_bytes_per_s(self, side: Side) -> float:
        """Return the bytes of weights that a token reads, over the time per token."""
        return self.read_bytes["stock" if side is self.stock else "patched"] / side.token.median

    def ratio(self, quantity: str) -> float:
        """Return how many times faster the patched model is: stock median over patched median of a `Side` field."""
        return getattr(self.stock, quantity).median / getattr(self.patched, quantity).median

    def pairwise_ratio(self, quantity: str) -> float:
        """Return the median over rounds of stock time over patched time of the same round."""
        pairs = zip(getattr(self.stock, quantity).seconds, getattr(self.patched, quantity).seconds, strict=True)
        return statistics.median(stock / patched for stock, patched in pairs)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; times in milliseconds."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "workload": asdict(self.workload),
            "rounds": self.rounds,
            "stock": self._side(self.stock),
            "patched": self._side(self.patched),
            "ratio": {name: self.ratio(name) for name in QUANTITIES},
            "pairwise_ratio": {name: self.pairwise_ratio(name) for name in QUANTITIES},
            "is_disturbed": self.is_disturbed,
            "same_ids": self.difference is None,
            "difference": self.difference and self.difference.to_dict(),
            "weight_bytes": self.weight_bytes,
            "read_bytes": self.read_bytes,
            "extra_bytes": self.report.extra_bytes,
            "read_bandwidth_bytes_per_s": self.read_bandwidth_bytes_per_s,
            "report": self.report.to_dict(),
            "machine": asdict(self.machine),
            "versions": self.versions,
            "date": self.date,
        }

    def _side(self, side: Side) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name in QUANTITIES:
            timing = getattr(side, name)
            values[f"{name}_ms"] = 1e3 * timing.median
            values[f"{name}_spread"] = timing.spread
        values["resident_bytes"] = statistics.median(side.resident_bytes) if side.resident_bytes else None
        achieved = None if side is self.patched and self.speculates else self.achieved_bytes_per_s(side)
        return values | {
            "tokens_per_s": self.workload.batch / side.token.median,
            "achieved_bytes_per_s": achieved,
            "share_of_bandwidth": None if achieved is None else achieved / self.read_bandwidth_bytes_per_s,
        }
