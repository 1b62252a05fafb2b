"""Measure what it gains that rows leave when they end: `python measure_rows.py [SHAPE] [BITS] [BATCH] [LAYERS]`.

SHAPE: llama-1b or smollm-135m, with random weights in bf16. BITS: 16 (weights as they are), 8 or 4. Each row ends after
a number of tokens drawn from 16 to 256 by a fixed seed: the script puts an end of text there, in both ways alike.
Whole calls of greedy decoding without drafts, rows kept and rows leaving in alternation, over the same weights.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import hf_accel
from hf_accel.core.calls.doors import Door
from hf_accel.core.calls.hosting import host_of
from hf_accel.decoding.rows_left import RowsLeft
from hf_accel.decoding.writing import Writing
from hf_accel.kernels import native
from hf_accel.measure.bandwidth import read_bandwidth
from hf_accel.measure.subjects.shapes import shape_config

PROMPT, LEAST, MOST, END = 64, 16, 256, 3


def built(shape: str, bits: int, layers: int | None) -> Any:
    """Return an optimised model of random weights."""
    config = shape_config(shape) if layers is None else shape_config(shape, layers)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = END, 0
    hf_accel.optimize(model, "exact" if bits == 16 else ["exact", hf_accel.WeightOnlyConfig(bits=bits)])
    return model


@contextmanager
def ending(lengths: list[int]) -> Iterator[None]:
    """Let row b of every call in the block end after lengths[b] new tokens."""
    honest = Writing.take

    def take(self: Writing, step: Any) -> None:
        for row, length in enumerate(lengths):
            if self.length - PROMPT + 1 == length:
                step.tokens[row] = END
        honest(self, step)

    Writing.take = take  # type: ignore[method-assign]
    try:
        yield
    finally:
        Writing.take = honest  # type: ignore[method-assign]


def seconds(model: Any, lengths: list[int]) -> float:
    """Return how long a call takes whose rows end after these numbers of tokens."""
    ids = torch.randint(5, 30000, (len(lengths), PROMPT), generator=torch.Generator().manual_seed(1))
    with ending(lengths):
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=MOST, do_sample=False, speculative=False)
        return time.perf_counter() - start


def measured(model: Any, batch: int, rounds: int = 2) -> str:
    """Return one line of results for a batch."""
    lengths = torch.randint(LEAST, MOST + 1, (batch,), generator=torch.Generator().manual_seed(7)).tolist()
    loop: Any = host_of(model).doors[Door.TOKEN_LOOP]  # type: ignore[union-attr]
    found: dict[str, list[float]] = {"kept": [], "leaving": []}
    counts = RowsLeft()
    for number in range(rounds):
        for way, times in found.items():
            loop.rows_left = counts if way == "leaving" else None
            if not number:
                seconds(model, [LEAST // 2] * batch)  # not counted
            times.append(seconds(model, lengths))
    kept, leaving = (statistics.median(times) for times in found.values())
    each = {rows: (seconds(model, [40] * rows) - seconds(model, [8] * rows)) / 32 for rows in (1, batch)}
    text = {way: ", ".join(f"{took:.2f}" for took in times) for way, times in found.items()}
    share = sum(lengths) / (batch * max(lengths))
    return (
        f"batch {batch}, {max(lengths)} steps, {share:.0%} of row-steps wanted: kept {text['kept']} s, "
        f"leaving {text['leaving']} s, {kept / leaving:.2f} x; a step of {batch} rows {1e3 * each[batch]:.1f} ms, "
        f"of one {1e3 * each[1]:.1f} ms; {counts}"
    )


def main(shape: str = "llama-1b", bits: str = "4", batch: str = "8", layers: str = "") -> None:
    """Measure and print."""
    model = built(shape, int(bits), int(layers) if layers else None)
    print(f"{shape}, {bits} bits, {layers or 'all'} layers ({native.status().isa}, {read_bandwidth() / 1e9:.1f} GB/s)")
    print(" " + measured(model, int(batch)))


if __name__ == "__main__":
    main(*sys.argv[1:])
