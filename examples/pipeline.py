"""A text-generation pipeline is optimised through the wrapper; the code that calls it does not change.

python examples/pipeline.py
"""

from transformers import pipeline

import hf_accel
from hf_accel.assets import demo_path

generator = pipeline("text-generation", model=str(demo_path()), device="cpu")

with hf_accel.optimized(generator):
    for prompt in ("import os\n", "class Point:\n    def __init__(self, x, y):"):
        [result] = generator(prompt, max_new_tokens=24, do_sample=False)
        print(result["generated_text"])
        print("-----")
    print(hf_accel.report(generator))
