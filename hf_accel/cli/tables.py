"""Results of measurements as tables for people."""

from __future__ import annotations

import statistics

from rich.table import Table

from hf_accel.measure import Bench


def speed_table(result: Bench) -> Table:
    """Return stock and patched side by side: medians with their spread, and the ratio."""
    table = Table(title=f"{result.model}, {result.dtype}: {describe(result)}", title_justify="left")
    for name in ("", "stock", "patched", "ratio", "pairwise"):
        table.add_column(name, justify="left" if not name else "right")
    rows = {
        "prefill, ms": "prefill",
        "decode, ms per token": "token",
        "median token, ms": "median_token",
        "whole call, ms": "whole",
        "call for 1 new token, ms": "one_token_call",
        "fixed cost of a call, ms": "fixed",
    }
    if result.speculates:
        del rows["median token, ms"]  # tokens arrive several at once, most of them in no time
    for label, quantity in rows.items():
        sides = [getattr(side, quantity) for side in (result.stock, result.patched)]
        cells = [f"{1e3 * timing.median:.2f} ± {100 * timing.spread:.0f} %" for timing in sides]
        table.add_row(label, *cells, f"{result.ratio(quantity):.2f} x", f"{result.pairwise_ratio(quantity):.2f} x")
    sides = [result.stock, result.patched]
    batch = result.workload.batch
    table.add_row("tokens/s", *(f"{batch / side.token.median:.1f}" for side in sides))
    # under speculation tokens share a reading of the weights
    rates = [result.achieved_bytes_per_s(side) for side in sides if side is result.stock or not result.speculates]
    table.add_row("weights read, GB/s", *(f"{rate / 1e9:.1f}" for rate in rates))
    table.add_row("share of bandwidth", *(f"{100 * rate / result.read_bandwidth_bytes_per_s:.0f} %" for rate in rates))
    if all(side.resident_bytes for side in sides):
        held = [statistics.median(side.resident_bytes) for side in sides]
        table.add_row("memory held, MB", *(f"{count / 1e6:.0f}" for count in held), f"{held[1] / held[0]:.3f} x")
    return table


def describe(result: Bench) -> str:
    """Return the workload in words."""
    work = result.workload
    words = [f"prompt {work.prompt_tokens}", f"{work.new_tokens} new", f"batch {work.batch}"]
    if work.has_left_padding:
        words.append("left padding")
    if work.samples:
        named = {"top-k": work.top_k, "top-p": work.top_p, "temperature": work.temperature}
        chosen = [f"{name} {value:g}" for name, value in named.items() if value is not None]
        words.append(" ".join(["sampling", *chosen]))
    return ", ".join([*words, f"{result.rounds} rounds"])


def footer(result: Bench) -> str:
    """Return what the table does not say: bytes, bandwidth, machine, versions."""
    machine, versions = result.machine, result.versions
    where = f"{machine.gpu}, {machine.cpu}" if result.report.device.startswith("cuda") and machine.gpu else machine.cpu
    extra = result.report.extra_bytes
    return (
        f"weights {result.weight_bytes / 1e6:.1f} MB, extra {extra / 1e6:.2f} MB "
        f"({100 * extra / result.weight_bytes:.2f} %); measured read bandwidth "
        f"{result.read_bandwidth_bytes_per_s / 1e9:.1f} GB/s\n"
        f"{where}, {machine.cores} cores, {machine.threads} threads; torch {versions['torch']}, "
        f"transformers {versions['transformers']}, Python {versions['python']}; {result.date}"
        + (
            "\n[yellow]Other programs disturbed the measurement; measure again on a quieter machine.[/]"
            * result.is_disturbed
        )
    )
