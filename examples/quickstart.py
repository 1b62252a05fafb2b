"""The whole of hf-accel in a few lines: optimise, generate, look, undo.

python examples/quickstart.py
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_accel
from hf_accel.assets import demo_path

name = demo_path()  # any folder or hub id of a causal language model
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
inputs = tokenizer("def area(width, height):", return_tensors="pt", return_token_type_ids=False)

stock = model.generate(**inputs, max_new_tokens=40, do_sample=False)

hf_accel.optimize(model)
optimised = model.generate(**inputs, max_new_tokens=40, do_sample=False)

print(tokenizer.decode(optimised[0]))
print("the same tokens as stock:", torch.equal(stock, optimised))
print(hf_accel.report(model))

hf_accel.restore(model)
