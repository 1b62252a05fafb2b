"""Measure stock and optimised in alternation from Python, as `hf-accel bench` does from the command line.

python examples/compare_speed.py [folder or hub id]
"""

import sys

import torch
from transformers import AutoModelForCausalLM

import hf_accel
from hf_accel.assets import demo_path
from hf_accel.measure import Workload, run_bench

name = sys.argv[1] if len(sys.argv) > 1 else str(demo_path())
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)

result = run_bench(model, hf_accel.plan(model), Workload(prompt_tokens=32, new_tokens=32, rounds=3))

for state, side in (("stock", result.stock), ("optimised", result.patched)):
    gigabytes_per_s = result.achieved_bytes_per_s(side) / 1e9
    print(f"{state:>10}: {1e3 * side.token.median:.2f} ms per token, {gigabytes_per_s:.1f} GB/s of weights")
print(f"     ratio: {result.ratio('token'):.2f} x")
print("    tokens:", "the same" if result.difference is None else f"differ: {result.difference}")
