"""The benchmark: a stock and a patched model in alternation, in one process, as medians with their spread.

Decoding reads every weight once per token, so beside milliseconds stands what they mean: weight bytes per second,
and their share of the rate at which this machine reads memory.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_accel.core.anatomy import Anatomy
from hf_accel.core.hosting import Host
from hf_accel.core.journal import Journal
from hf_accel.core.plan import Plan, new_report
from hf_accel.core.report import Report
from hf_accel.errors import ConfigError
from hf_accel.measure.bandwidth import read_bandwidth
from hf_accel.measure.difference import Difference, explain
from hf_accel.measure.latency import Run, Timing, alternate, timed_generate
from hf_accel.measure.machine import Machine, resident_bytes, versions
from hf_accel.measure.overhead import CallCost, call_cost
from hf_accel.measure.workload import random_prompt

WARM_UP_TOKENS = 3
CALLS = 5  # one-token calls per round
SHORT_PROMPT_TOKENS = 8
QUANTITIES = ("prefill", "token", "whole", "one_token_call", "fixed")  # the timings of a Side


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is generated, and how often. Sampling draws from the same seed on both sides."""

    prompt_tokens: int = 128
    new_tokens: int = 64
    batch: int = 1
    has_left_padding: bool = False
    samples: bool = False
    top_k: int | None = None
    top_p: float | None = None
    temperature: float | None = None
    rounds: int = 5

    def __post_init__(self) -> None:
        if self.has_left_padding and self.batch < 2:
            raise ConfigError("Left padding comes from rows of different length; give a batch of at least 2.")
        if not self.samples and {self.top_k, self.top_p, self.temperature} != {None}:
            raise ConfigError("top-k, top-p and temperature belong to sampling; ask for sampling as well.")
        if min(self.prompt_tokens, self.batch, self.rounds) < 1 or self.new_tokens < 2:
            raise ConfigError("A benchmark needs at least 1 prompt token, 2 new tokens, 1 row and 1 round.")

    def inputs(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Return random `input_ids` and their `attention_mask`, [batch, prompt_tokens] each.

        With left padding the first row is full and every further one shorter, down to about half.
        """
        ids = random_prompt(model, self.prompt_tokens, self.batch)
        mask = torch.ones_like(ids)
        if self.has_left_padding:
            for row in range(self.batch):
                mask[row, : self.prompt_tokens * row // (2 * self.batch)] = 0
        return {"input_ids": ids, "attention_mask": mask}

    def arguments(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return the other arguments of `generate`."""
        config: Any = model.generation_config
        chosen = {name: getattr(self, name) for name in ("top_k", "top_p", "temperature")}
        pad = config.pad_token_id if config.pad_token_id is not None else 0
        given = {name: value for name, value in chosen.items() if value is not None}
        return given | {"do_sample": self.samples, "num_beams": 1, "pad_token_id": pad}


@dataclass
class Side:
    """The measurements of one state of the model, one value per round."""

    prefill: Timing = field(default_factory=Timing)
    token: Timing = field(default_factory=Timing)
    whole: Timing = field(default_factory=Timing)
    one_token_call: Timing = field(default_factory=Timing)
    fixed: Timing = field(default_factory=Timing)
    resident_bytes: list[int] = field(default_factory=list)  # after generating; empty without psutil

    def add(self, sample: _Sample) -> None:
        run, costs = sample.run, sample.costs
        self.prefill.seconds.append(run.prefill_s)
        self.token.seconds.append(run.token_s)
        self.whole.seconds.append(run.prefill_s + sum(run.tokens_s))
        self.one_token_call.seconds.append(statistics.median(cost.whole_s for cost in costs))
        self.fixed.seconds.append(statistics.median(cost.fixed_s for cost in costs))
        if sample.resident_bytes is not None:
            self.resident_bytes.append(sample.resident_bytes)


@dataclass
class Bench:
    """The result: measurements of both states and everything needed to read them."""

    model: str
    dtype: str
    workload: Workload
    weight_bytes: int
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

    def achieved_bytes_per_s(self, side: Side) -> float:
        """Weight bytes (each parameter once) over the median time per token."""
        return self.weight_bytes / side.token.median

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
            "same_ids": self.difference is None,
            "difference": self.difference and self.difference.to_dict(),
            "weight_bytes": self.weight_bytes,
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
        achieved = self.achieved_bytes_per_s(side)
        return values | {
            "tokens_per_s": self.workload.batch / side.token.median,
            "achieved_bytes_per_s": achieved,
            "share_of_bandwidth": achieved / self.read_bandwidth_bytes_per_s,
        }


def run_bench(
    model: PreTrainedModel,
    plan: Plan,
    workload: Workload,
    *,
    name: str | None = None,
    inputs: Mapping[str, torch.Tensor] | None = None,
    progress: Callable[[], None] | None = None,
    budget_s: float = math.inf,
) -> Bench:
    """Measure `model` as it is and with `plan` applied, in alternation; it is left as it was.

    Args:
        model: a transformers causal language model in its original state.
        plan: the same steps are applied in every round and undone at its end; their cost is not counted.
        workload: what to generate.
        name: how to call the model in the result; by default its class.
        inputs: `input_ids` and `attention_mask` [B, T] instead of the workload's random ones.
        progress: called after each of the 2 x rounds measurements.
        budget_s: no further round begins once this time is spent, but two are always made.

    Raises:
        UnsupportedModelError: the model cannot be optimised, or not by this plan.
        VerificationError: a step of the plan failed its own check.
    """
    anatomy = Anatomy.of(model)
    given = dict(inputs) if inputs is not None else workload.inputs(model)
    bandwidth = read_bandwidth(anatomy.device)
    ways = {"stock": _Way(anatomy, None, workload, given), "patched": _Way(anatomy, plan, workload, given)}
    runs = alternate(ways, workload.rounds, progress, budget_s)
    sides = {"stock": Side(), "patched": Side()}
    for state, side in sides.items():
        for sample in runs[state]:
            side.add(sample)
    pairs = [(stock.run.ids, patched.run.ids) for stock, patched in zip(runs["stock"], runs["patched"], strict=True)]
    stock_ids, patched_ids = next((pair for pair in pairs if not torch.equal(*pair)), pairs[0])
    torch.manual_seed(0)
    return Bench(
        model=name or type(model).__name__,
        dtype=str(anatomy.dtype).removeprefix("torch."),
        workload=workload,
        weight_bytes=anatomy.weight_bytes,
        read_bandwidth_bytes_per_s=bandwidth,
        stock=sides["stock"],
        patched=sides["patched"],
        stock_ids=stock_ids,
        patched_ids=patched_ids,
        difference=explain(model, given, stock_ids, patched_ids, **workload.arguments(model)),
        report=ways["patched"].report,
        machine=Machine.here(),
        versions=versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


@dataclass(frozen=True)
class _Sample:
    """What one round measured of one state."""

    run: Run
    costs: list[CallCost]
    resident_bytes: int | None


class _Way:
    """One state of the model to measure; `report` is that of the latest round."""

    def __init__(
        self, anatomy: Anatomy, plan: Plan | None, workload: Workload, inputs: dict[str, torch.Tensor]
    ) -> None:
        self.anatomy, self.plan, self.workload, self.inputs = anatomy, plan, workload, inputs
        self.report = new_report(anatomy, plan or Plan())

    def __call__(self) -> _Sample:
        model, journal = self.anatomy.model, Journal()
        arguments = self.workload.arguments(model)
        short = {key: tensor[:1, -SHORT_PROMPT_TOKENS:] for key, tensor in self.inputs.items()}
        try:
            if self.plan is not None:
                host = Host(journal, new_report(self.anatomy, self.plan))
                host.report.calls = host.calls
                self.plan.apply(self.anatomy, host)
                self.report = host.report
            timed_generate(model, short, WARM_UP_TOKENS, **arguments)
            costs = [call_cost(model, short, **arguments) for _ in range(CALLS)]
            torch.manual_seed(0)
            run = timed_generate(model, self.inputs, self.workload.new_tokens, **arguments)
            return _Sample(run, costs, resident_bytes())
        finally:
            journal.undo()
