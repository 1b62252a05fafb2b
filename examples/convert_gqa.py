"""Fewer key and value heads: what each number would cost, the conversion, and the same text after loading it again.

python examples/convert_gqa.py
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_accel
from hf_accel.assets import demo_path

name = demo_path()  # any folder or hub id; this model has 6 query heads and 2 for keys and values
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
inputs = tokenizer("def area(width, height):", return_tensors="pt", return_token_type_ids=False)
text = Path(argparse.__file__).read_text()[:6000]  # for a real one: more text, of the kind that the model will write

# nothing changes yet, and nothing is repaired in this quick look; 200 repair steps are usual
config = hf_accel.GQAConfig(num_kv_heads=1, repair_steps=0)
print(hf_accel.plan(model, config, calibration=text, tokenizer=tokenizer))

small = hf_accel.convert_gqa(model, 1, calibration=text, tokenizer=tokenizer, repair_steps=4)
print(f"key/value heads: {model.config.num_key_value_heads} -> {small.config.num_key_value_heads}")
ids = small.generate(**inputs, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(ids[0]))

with tempfile.TemporaryDirectory() as folder:
    small.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)  # stock transformers: hf_accel is not needed any more

same = again.generate(**inputs, max_new_tokens=40, do_sample=False)
print("the same tokens after loading:", torch.equal(ids, same))
