"""Streamers work as ever: the text appears token by token.

python examples/streaming.py
"""

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import hf_accel
from hf_accel.assets import demo_path

tokenizer = AutoTokenizer.from_pretrained(demo_path())
model = hf_accel.optimize(AutoModelForCausalLM.from_pretrained(demo_path()))
inputs = tokenizer("def read(path):", return_tensors="pt", return_token_type_ids=False)

model.generate(
    **inputs, max_new_tokens=40, do_sample=True, temperature=0.8, top_p=0.9, streamer=TextStreamer(tokenizer)
)
