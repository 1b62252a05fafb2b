"""Measure prompts, steps of several rows and sampling: `python measure_prompts.py WHAT [BITS] [LAYERS]`.

The shape of llama-1b with random weights in bf16. WHAT: `prompts` (of 128, 512 and 2,048 tokens), `rows` (passes over 1
to 16 tokens), `batch` (8 texts), `decode`, or `sampling` beside greedy. BITS: 16 (weights as they are), 8 or 4. LAYERS:
16. Stock and optimised in alternation, no drafts; medians, and from the least to the most.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import hf_accel
from hf_accel.core.drift import CACHE
from hf_accel.core.model.shadow import shadow
from hf_accel.kernels import native
from hf_accel.measure.bandwidth import read_bandwidth
from hf_accel.measure.subjects.shapes import shape_config

SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.9}


def built(bits: int, layers: int) -> tuple[Any, Any]:
    """Return stock's model and the optimised one, which share the weights that are left as they are."""
    model: Any = AutoModelForCausalLM.from_config(shape_config("llama-1b", layers), dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    stock = shadow(model)
    hf_accel.optimize(model, "exact" if bits == 16 else ["exact", hf_accel.WeightOnlyConfig(bits=bits)])
    return stock, model


def ids_of(batch: int, tokens: int) -> torch.Tensor:
    """Return random tokens [batch, tokens]."""
    return torch.randint(5, 30000, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def seconds(model: Any, ids: torch.Tensor, new: int, keywords: dict[str, Any]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=new, min_new_tokens=new, **{"do_sample": False} | keywords)
    return time.perf_counter() - start


def alternate(ways: dict[str, Callable[[], float]], rounds: int) -> None:
    """Time the ways in turn, after one round that does not count, and print them beside the first."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            took = way()
            if number:
                found[name].append(took * 1e3)
    medians = {name: statistics.median(times) for name, times in found.items()}
    first = next(iter(medians.values()))
    for name, times in found.items():
        median = medians[name]
        print(f"  {name}: {median:.2f} ms ({min(times):.2f} to {max(times):.2f}), {first / median:.2f} x")


def steps(model: Any, ids: torch.Tensor, new: int, keywords: dict[str, Any]) -> float:
    """Return seconds of a step after the prompt."""
    return (seconds(model, ids, new + 1, keywords) - seconds(model, ids, 1, keywords)) / new


def rows_of(model: Any) -> Callable[[int], float]:
    """Return what times a pass over so many rows after a prompt of 32 tokens, which are dropped again."""
    call = {"max_new_tokens": 2, "return_dict_in_generate": True, "speculative": False, "do_sample": False}
    cache = model.generate(ids_of(1, 32), **call)[CACHE]

    @torch.no_grad()
    def timed(rows: int) -> float:
        ids = ids_of(1, rows)
        start = time.perf_counter()
        model(ids, **{CACHE: cache}, use_cache=True)
        took = time.perf_counter() - start
        cache.crop(-rows)
        return took

    return timed


def main(what: str, bits: str = "16", layers: str = "16") -> None:
    """Measure one thing and print its lines."""
    stock, model = built(int(bits), int(layers))
    both: list[tuple[str, Any, dict[str, Any]]] = [("stock", stock, {}), ("optimised", model, {"speculative": False})]
    memory = read_bandwidth() / 1e9
    print(f"{what}, {bits} bits, {layers} layers ({native.status().isa}, {memory:.1f} GB/s)")
    print(*(line.split(";")[0] for line in str(hf_accel.report(model)).splitlines() if "decoder layers" in line))
    if what == "prompts":
        for tokens, rounds in ((128, 5), (512, 3), (2048, 1)):
            print(f" {tokens} tokens")
            alternate({n: partial(seconds, m, ids_of(1, tokens), 1, k) for n, m, k in both}, rounds)
    elif what == "rows":
        timed = rows_of(model)
        alternate({f"{rows} rows": partial(timed, rows) for rows in (1, 2, 4, 8, 16)}, 9)
    elif what == "batch":
        alternate({n: partial(steps, m, ids_of(8, 128), 12, k) for n, m, k in both}, 3)
    elif what == "decode":
        alternate({n: partial(steps, m, ids_of(1, 128), 24, k) for n, m, k in both}, 3)
    elif what == "sampling":
        ways = {"greedy": {}, "sampling": SAMPLING}
        alternate({n: partial(steps, model, ids_of(1, 32), 32, {"speculative": False} | k) for n, k in ways.items()}, 5)
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:])
