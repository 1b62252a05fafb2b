"""One model, four caches: as it is, in 8 bits, within a budget with the rest in a file, and reused by a second call."""

import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_accel
from hf_accel import KVCacheConfig
from hf_accel.assets import demo_path

model = AutoModelForCausalLM.from_pretrained(demo_path())
tokenizer = AutoTokenizer.from_pretrained(demo_path())
hf_accel.optimize(model)

with open(hf_accel.__file__) as source:
    prompt = tokenizer(source.read() * 2, return_tensors="pt", truncation=True, max_length=700)
question = {"max_new_tokens": 24, "do_sample": False}
plain = model.generate(**prompt, **question)

kinds = {
    "8 bits": KVCacheConfig(bits=8),
    "512 KiB of memory, the rest in a file": KVCacheConfig(store="disk", device_budget_bytes=512 << 10),
    "a quarter of the prompt, by SnapKV": KVCacheConfig(eviction="snapkv", kept_tokens=175, sinks=4),
}
for name, config in kinds.items():
    text = model.generate(**prompt, **question, kv_cache=config)
    new = slice(prompt["input_ids"].shape[1], None)
    same = text.shape == plain.shape and torch.equal(text, plain)
    print(f"{name}: {'the same text' if same else repr(tokenizer.decode(text[0, new]))}")

for attempt in ("first", "second"):
    start = time.perf_counter()
    model.generate(**prompt, max_new_tokens=1, do_sample=False, kv_cache=KVCacheConfig(prefix_reuse=True), tenant="a")
    print(f"{attempt} call of tenant a: first token after {1000 * (time.perf_counter() - start):.0f} ms")
print(hf_accel.report(model).kv_cache)
