"""Several tokens per step: drafts from the text and from the model's own weights in few bits, the same text.

The embedded model is so small that a step is not made of reading weights: its own weights in few bits draft hardly
faster than it writes. The governor sees that; with `adaptive=False` they draft all the same.

python examples/speculation.py [folder or hub id]
"""

import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_accel
from hf_accel import SpeculativeConfig
from hf_accel.assets import demo_path

NEW_TOKENS = 96
ROUNDS = 2

name = sys.argv[1] if len(sys.argv) > 1 else str(demo_path())
if name == str(demo_path()):
    torch.set_num_threads(1)  # so small a model gains nothing from more
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
prompt = "import os\n\n\ndef find_files(folder, suffix):\n"
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)

for config in (
    SpeculativeConfig(drafter="lookup"),
    SpeculativeConfig(drafter="self"),
    SpeculativeConfig(drafter="self", adaptive=False),
):
    with hf_accel.optimized(model, config):
        ids, seconds = {}, {False: [], True: []}
        for _ in range(ROUNDS):
            for speculative in (False, True):  # in alternation, as machines are noisy
                start = time.perf_counter()
                ids[speculative] = model.generate(
                    **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, speculative=speculative
                )
                seconds[speculative].append(time.perf_counter() - start)
        report = hf_accel.report(model).to_dict()
    tokens = ids[True].shape[1] - inputs["input_ids"].shape[1]
    plain, drafted = (tokens / min(seconds[speculative]) for speculative in (False, True))
    each = report["speculation"]["tokens_per_step"]
    print(f"{config.drafter}{'' if config.adaptive else ', not adaptive'}:")
    print(f"  {plain:.0f} tokens/s plain, {drafted:.0f} speculative, {each:.2f} tokens per step")
    print("  the same tokens:", torch.equal(ids[False], ids[True]))
    for skip in report["skipped"]:
        print("  not done:", skip["reason"])
