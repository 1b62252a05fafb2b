"""`hf-accel plan`: what optimising would do, before anything happens."""

from __future__ import annotations

from dataclasses import asdict

from hf_accel.cli.models import (
    AsJson,
    Bits,
    Device,
    Dtype,
    DtypeName,
    GoalName,
    GroupSize,
    ModelName,
    Threads,
    few_bits,
    load_model,
    make_plan,
    use_threads,
)
from hf_accel.cli.output import results, write_json


def plan(
    model: ModelName,
    goal: GoalName = "exact",
    bits: Bits = None,
    group_size: GroupSize = None,
    dtype: DtypeName = Dtype.bfloat16,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Show what would be applied to MODEL, what would not and why, as measured on this machine."""
    configs = few_bits(bits, group_size)
    use_threads(threads)
    chosen = make_plan(load_model(model, dtype.torch, device), goal, configs)
    if as_json:
        measured = {"measured": chosen.measured and asdict(chosen.measured)}
        write_json(chosen.to_dict() | measured | {"quality": chosen.quality and chosen.quality.to_dict()})
        return
    results.print(str(chosen), markup=False, highlight=False, soft_wrap=True)
    if chosen.measured:
        speed = chosen.measured
        results.print(
            f"measured: {speed.change}, {100 * speed.share_of_bandwidth:.0f} % of the memory bandwidth",
            highlight=False,
        )
