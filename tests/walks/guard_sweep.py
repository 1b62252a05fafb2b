"""Run as a program: `guard_sweep.py SEED SECONDS [plain]`; at least one case of each kind, printed before it runs.

With "plain" memory has no guards, for a library that a sanitizer watches.

The last line is JSON: per kind and instruction set how many cases ran, how many were bit-equal to portable C and to the
best instruction set (see `best_for`), and the largest relative difference from portable C. A read outside an operand
ends the process; the line before names the case.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import time

import torch
from guard_cases import KINDS, Cases
from guarding import Pages, outputs_in

from hf_accel.kernels import native


def where_finite(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both with zeros where both are NaN, or the same infinity: squares of numbers in half precision may be."""
    is_both = ~one.isfinite() & ((one == other) | (one.isnan() & other.isnan()))
    return one.masked_fill(is_both, 0), other.masked_fill(is_both, 0)


def distance(result: torch.Tensor, portable: torch.Tensor) -> float:
    result, portable = where_finite(result, portable)
    if not (result.isfinite().all() and portable.isfinite().all()):
        return torch.inf
    return ((result.double() - portable.double()).norm() / portable.double().norm().clamp_min(1e-9)).item()


def best_for(kind: str, dtype: torch.dtype) -> str:
    """Return the best instruction set; for packed weights in bf16 the best but AMX, which has its own order there."""
    names = native.supported_isas()
    is_apart = names[-1] == "amx" and kind.startswith("packed") and dtype == torch.bfloat16
    return names[-2] if is_apart else names[-1]


def sweep(seed: int, seconds: float, are_guarded: bool = True) -> dict[str, dict[str, dict[str, float]]]:
    cases = Cases(seed, Pages(are_guarded=are_guarded))
    found: dict[str, dict[str, dict[str, float]]] = {}
    end, count = time.monotonic() + seconds, 0
    while count < len(KINDS) or time.monotonic() < end:
        case = cases.draw(KINDS[count % len(KINDS)])
        count += 1
        results = {}
        torch.set_num_threads(cases.random.choice([1, 1, 1, 2, 3]))
        for isa in native.supported_isas():
            native.set_isa(isa)
            print(f"{isa}: {case.title}", flush=True)
            with outputs_in(cases.pages):
                results[isa] = case.run()
        key = f"{case.kind} {str(case.dtype)[6:]}"
        best = results[best_for(case.kind, case.dtype)]
        for isa, result in results.items():
            seen = found.setdefault(key, {}).setdefault(isa, {"cases": 0, "portable": 0, "best": 0, "difference": 0.0})
            seen["cases"] += 1
            seen["portable"] += torch.equal(*where_finite(result, results["portable"]))
            seen["best"] += torch.equal(*where_finite(result, best))
            seen["difference"] = max(seen["difference"], distance(result, results["portable"]))
    cases.pages.clear()
    return found


if __name__ == "__main__":
    faulthandler.enable()
    print(json.dumps(sweep(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:] != ["plain"])))
