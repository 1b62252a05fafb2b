"""Heal a changed model: keys of the demo model become equal over heads, and a few steps bring most of the quality back.

python examples/uptrain.py
"""

import argparse
import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_accel.assets import demo_path
from hf_accel.recipes import uptrain

name = demo_path()  # any folder or hub id of a causal language model
tokenizer = AutoTokenizer.from_pretrained(name)
teacher = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)

student = copy.deepcopy(teacher)
with torch.no_grad():
    for layer in student.model.layers[:2]:
        keys = layer.self_attn.k_proj.weight.view(teacher.config.num_key_value_heads, -1, teacher.config.hidden_size)
        keys[:] = keys.mean(0)

# minutes=10 instead of steps for a real one, and out="folder" to be able to continue it
text = Path(argparse.__file__).read_text()
result = uptrain(student, teacher, [text], tokenizer=tokenizer, steps=8, window=128, batch_size=8, bf16=False)
print(result)
