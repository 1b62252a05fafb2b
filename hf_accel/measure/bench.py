"""The benchmark: a stock and a patched model in alternation, in one process, as medians with their spread.

Decoding reads every weight once per token, so beside milliseconds stands what they mean: weight bytes per second,
and their share of the rate at which this machine reads memory.

The time per token of a round is its mean: other programs take slices of some milliseconds, which hit more than half of
long tokens but less than half of short ones, so that a median within a round would flatter whichever side is faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import UTC, datetime

import torch
from transformers import PreTrainedModel

from hf_accel.core.steps.applying import applied, new_report
from hf_accel.core.steps.plan import Plan
from hf_accel.core.steps.setting import Setting
from hf_accel.measure.bandwidth import read_bandwidth
from hf_accel.measure.difference import explain
from hf_accel.measure.latency import alternate, timed_generate
from hf_accel.measure.machine import Machine, resident_bytes, versions
from hf_accel.measure.overhead import call_cost
from hf_accel.measure.result import Bench, Sample, Side
from hf_accel.measure.workload import Workload

WARM_UP_TOKENS = 3
CALLS = 5  # one-token calls per round
SHORT_PROMPT_TOKENS = 8


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
    setting = Setting.of(model, draft_model=plan.draft_model)
    setting.keep_prepared()  # weights in few bits are made once and put in place in every round
    anatomy = setting.anatomy
    given = dict(inputs) if inputs is not None else workload.inputs(model)
    bandwidth = read_bandwidth(anatomy.device)
    ways = {"stock": _State(setting, None, workload, given), "patched": _State(setting, plan, workload, given)}
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
        read_bytes={state: way.read_bytes for state, way in ways.items()},
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


class _State:
    """One state of the model to measure; `report` is that of the latest round."""

    def __init__(
        self, setting: Setting, plan: Plan | None, workload: Workload, inputs: dict[str, torch.Tensor]
    ) -> None:
        self.setting, self.plan, self.workload, self.inputs = setting, plan, workload, inputs
        self.report = new_report(plan or Plan(), setting)
        self.read_bytes = setting.anatomy.read_bytes

    def __call__(self) -> Sample:
        model = self.setting.model
        arguments = self.workload.arguments(model)
        short = {key: tensor[:1, -SHORT_PROMPT_TOKENS:] for key, tensor in self.inputs.items()}
        with nullcontext() if self.plan is None else applied(self.plan, self.setting) as host:
            if host is not None:
                self.report, self.read_bytes = host.report, self.setting.anatomy.read_bytes
            timed_generate(model, short, WARM_UP_TOKENS, **arguments)
            costs = [call_cost(model, short, **arguments) for _ in range(CALLS)]
            torch.manual_seed(0)
            run = timed_generate(model, self.inputs, self.workload.new_tokens, **arguments)
            return Sample(run, costs, resident_bytes())
