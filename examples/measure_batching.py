"""Measure concurrent calls: `python measure_batching.py [SHAPE] [BITS] [LAYERS] [CALLERS] [CALLS] [ROUNDS] [LATENCY]`.

SHAPE: llama-1b or another of `hf_accel.measure.subjects`, random weights in bf16. BITS: 16 (weights as they are), 8 or
4. LAYERS: 16. CALLERS threads make CALLS calls each, of prompts of 32 to 512 tokens and 16 to 128 new ones: one call
after the other, then all threads at once inside `serving`, ROUNDS times in alternation. No drafts. LATENCY: the target
between two tokens in ms, 0 for none.
"""

from __future__ import annotations

import random
import statistics
import sys
import threading
import time
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

import hf_accel
from hf_accel.kernels import native
from hf_accel.measure.bandwidth import read_bandwidth
from hf_accel.measure.subjects.shapes import shape_config


class Work(NamedTuple):
    """One call: prompt ids [1, T] and how many new tokens."""

    ids: torch.Tensor
    new: int


class Clock:
    """A streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def built(shape: str, bits: int, layers: int) -> Any:
    """Return an optimised model that writes as many tokens as it is told."""
    model: Any = AutoModelForCausalLM.from_config(shape_config(shape, layers), dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return hf_accel.optimize(model, "exact" if bits == 16 else ["exact", hf_accel.WeightOnlyConfig(bits=bits)])


def work_for(callers: int, calls: int) -> list[list[Work]]:
    """Return what each caller asks for, the same in every run."""
    picks, generator = random.Random(7), torch.Generator().manual_seed(7)
    return [
        [Work(torch.randint(5, 30000, (1, picks.randint(32, 512)), generator=generator), picks.randint(16, 128))
         for _ in range(calls)]
        for _ in range(callers)
    ]  # fmt: skip


def run(model: Any, callers: list[list[Work]], gaps: list[float]) -> float:
    """Return the seconds that the callers take, each a thread, and note the times between two tokens of a call."""

    def call(mine: list[Work]) -> None:
        for work in mine:
            clock = Clock()
            model.generate(work.ids, max_new_tokens=work.new, do_sample=False, speculative=False, streamer=clock)
            gaps.extend(after - before for before, after in zip(clock.times[1:], clock.times[2:], strict=False))

    threads = [threading.Thread(target=call, args=(mine,)) for mine in callers]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


def main(
    shape: str = "llama-1b",
    bits: str = "4",
    layers: str = "16",
    callers: str = "8",
    calls: str = "3",
    rounds: str = "2",
    latency: str = "0",
) -> None:
    """Measure, and print tokens per second and the times between two tokens."""
    model = built(shape, int(bits), int(layers))
    work = work_for(int(callers), int(calls))
    in_turn = [[each for mine in work for each in mine]]
    tokens = sum(each.new for each in in_turn[0])
    prompts = sum(each.ids.shape[1] for each in in_turn[0])
    print(f"{shape}, {bits} bits, {layers} layers, {callers} x {calls} calls, {prompts} + {tokens} tokens "
          f"({native.status().isa}, {read_bandwidth() / 1e9:.1f} GB/s)")  # fmt: skip
    found: dict[str, list[float]] = {"one after the other": [], "at once": []}
    gaps: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(int(rounds)):
        found["one after the other"].append(run(model, in_turn, gaps["one after the other"]))
        with hf_accel.serving(model, max_rows=int(callers), latency_ms=float(latency) or None):
            found["at once"].append(run(model, work, gaps["at once"]))
            report = str(hf_accel.report(model).joined_calls)
    for name, times in found.items():
        between = sorted(gaps[name])
        median = statistics.median(times)
        print(f"  {name}: {median:.1f} s ({min(times):.1f} to {max(times):.1f}), {tokens / median:.1f} tokens/s; "
              f"between tokens {1e3 * statistics.median(between):.1f} "
              f"ms, 95 % within {1e3 * between[int(0.95 * len(between))]:.1f} ms")  # fmt: skip
    print(f"  {statistics.median(found['one after the other']) / statistics.median(found['at once']):.2f} x")
    print("  " + report.replace("\n", "\n  "))


if __name__ == "__main__":
    main(*sys.argv[1:])
