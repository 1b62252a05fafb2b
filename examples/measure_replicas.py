"""Measure two replicas of one thread beside one model of two.

    python measure_replicas.py FOLDER [SHAPE [LAYERS [BITS]]]

FOLDER is written first if it is not there: random weights in bf16 (default: all layers of the shape smollm-135m; LAYERS
0 is all). Then the same requests, 32 tokens of prompt and 32 new ones, go one after the other through one model in this
process, in batches of 4 through the same, and all together to two replicas on Ray. For each: requests per second, and
memory, what is shared with others apart. BITS: weights in so many bits, packed and mapped.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_accel
from hf_accel.assets import demo_path
from hf_accel.measure import shape_config
from hf_accel.replicas import ModelRecipe, run
from hf_accel.replicas.memory import memory_of

REQUESTS, PROMPT, NEW = 16, 32, 32


def main() -> None:
    folder = Path(sys.argv[1])
    shape = sys.argv[2] if len(sys.argv) > 2 else "smollm-135m"
    layers = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    bits = int(sys.argv[4]) if len(sys.argv) > 4 else None
    if not folder.exists():
        config = shape_config(shape, layers or None)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(demo_path()).save_pretrained(folder)
    configs: list[Any] = [hf_accel.KVCacheConfig(), hf_accel.DecodingConfig(), hf_accel.DecoderBlockConfig()]
    if bits:
        configs = [hf_accel.WeightOnlyConfig(bits=bits), *configs]
        ModelRecipe(folder, configs).make()  # keeps the pack: below, it is mapped
    recipe = ModelRecipe(folder, configs)
    ids = torch.randint(8, 1000, (REQUESTS, PROMPT), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}

    torch.set_num_threads(2)
    model = recipe.make().model
    expected = one(model, ids, 1, "one model, 2 threads, one by one", options)
    one(model, ids, 4, "one model, 2 threads, batches of 4", options)
    print(f"memory of this process: {memory_of_this()}")
    del model
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    logging.getLogger("ray").setLevel(logging.ERROR)
    with run(recipe, replicas=2) as replicas:
        rows = [row[None] for row in ids]
        ask(replicas, rows[:4], options)
        began = time.perf_counter()
        found = ask(replicas, rows, options)
        shown("two replicas, 1 thread each", time.perf_counter() - began)
        print(f"the same tokens: {all(map(torch.equal, found, expected))}")
        for each in replicas.report()["replicas"]:
            print(f"replica of {each['threads']} thread: {in_mib(each['memory'])}")
    ray.shutdown()


def one(model: Any, ids: torch.Tensor, batch: int, title: str, options: dict[str, Any]) -> list[torch.Tensor]:
    model.generate(ids[:batch], **options)
    began = time.perf_counter()
    found = [model.generate(part, **options) for part in ids.split(batch)]
    shown(title, time.perf_counter() - began)
    return found


def ask(replicas: Any, rows: list[torch.Tensor], options: dict[str, Any]) -> list[torch.Tensor]:
    with ThreadPoolExecutor(len(rows)) as threads:
        return list(threads.map(lambda row: replicas.generate(row, **options), rows))


def shown(title: str, seconds: float) -> None:
    print(f"{title}: {REQUESTS / seconds:.2f} requests/s, {REQUESTS * NEW / seconds:.0f} tokens/s")


def memory_of_this() -> str:
    return in_mib(memory_of(os.getpid()))


def in_mib(memory: dict[str, int] | None) -> str:
    return "unknown" if memory is None else ", ".join(f"{name} {value >> 20} MiB" for name, value in memory.items())


if __name__ == "__main__":
    main()
