"""Weights in few bits: within a bound, saved, loaded again, and the same text again.

python examples/quantize.py
"""

import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_accel
from hf_accel.assets import demo_path

name = demo_path()  # any folder or hub id of a causal language model
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
inputs = tokenizer("def area(width, height):", return_tensors="pt", return_token_type_ids=False)

# the fewest bytes that cost at most 0.1 nats per token; the originals are given up on the way
plan = hf_accel.plan(model, "memory", max_kl=0.1)
hf_accel.optimize(model, plan, originals="drop")
print(hf_accel.report(model))
ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(ids[0]))

with tempfile.TemporaryDirectory() as folder:
    hf_accel.save_pretrained(model, folder)
    again = hf_accel.from_pretrained(folder)

hf_accel.optimize(again, plan.without(hf_accel.WeightOnlyConfig))  # its weights are packed already
same = again.generate(**inputs, max_new_tokens=40, do_sample=False)
print("the same tokens after loading:", torch.equal(ids, same))
