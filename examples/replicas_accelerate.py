"""Prompts shared out over processes by accelerate, without Ray: one model in each, every prompt written once.

    torchrun --nproc-per-node=2 replicas_accelerate.py [FILE]     # or: accelerate launch --num_processes=2 ...

On a CPU the processes talk over gloo. The first decides on a plan and hands it to the others, so that all models are
alike. Started alone, as `python replicas_accelerate.py`, it is one process. FILE: where the texts are kept, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

import hf_accel
from hf_accel import Plan
from hf_accel.assets import demo_path
from hf_accel.replicas import ModelRecipe
from hf_accel.replicas.batch import texts_of

state = PartialState(cpu=True)
# torchrun gives each process one thread; the processors of a machine in equal parts are more
here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))

prompts = [f"def f{number}(a, b):\n    return" for number in range(7)]
recipe = ModelRecipe(demo_path(), "exact")
told = [recipe.planned().goal_or_configs.to_json()] if state.is_main_process else [None]
plan = Plan.from_json(broadcast_object_list(told)[0])
model, tokenizer = ModelRecipe(demo_path(), plan).make()

with state.split_between_processes(list(enumerate(prompts))) as mine:
    rows = [text for _, text in mine]
    written = texts_of(model, tokenizer, rows, seed=0, options={"max_new_tokens": 24}) if rows else []
    found = [(number, text) for (number, _), text in zip(mine, written, strict=True)]
found = sorted(gather_object(found))

if state.is_main_process:
    once = "each written once" if [number for number, _ in found] == list(range(len(prompts))) else "not each once"
    print(f"{state.num_processes} processes, {len(prompts)} prompts, {once}")
    texts = [text for _, text in found]
    same = texts == [texts_of(model, tokenizer, [text], 0, {"max_new_tokens": 24})[0] for text in prompts]
    print(f"the same texts as one process: {same}")
    print(hf_accel.report(model).to_dict()["calls"])
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(dict(zip(prompts, texts, strict=True)), indent=1))
state.destroy_process_group()
