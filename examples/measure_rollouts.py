"""Measure rollouts: `python measure_rollouts.py [SHAPE] [LAYERS] [NEW] [DTYPE]`.

64 prompts of 48 tokens in four sampled calls of 16 rows, of which most end early; every weight is changed after each.
Stock and optimised by turns, on the same weights and seeds; LAYERS 0: as the shape has.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import hf_accel
from hf_accel.core.model.shadow import shadow
from hf_accel.kernels import native
from hf_accel.measure.subjects.shapes import shape_config

ROWS, PROMPT = 16, 48


def built(shape: str, layers: int, dtype: str, generator: torch.Generator) -> tuple[Any, Any]:
    """Return stock's model and the optimised one, on the same weights; about every 90th token sampled ends a row."""
    config = shape_config(shape, layers) if layers else shape_config(shape)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    vocabulary = config.vocab_size
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = torch.randperm(vocabulary, generator=generator)[: vocabulary // 90].tolist()
    stock = shadow(model)
    return stock, hf_accel.optimize(model, "exact")


@torch.no_grad()
def change(model: Any, generator: torch.Generator) -> None:
    """Change every weight a little, as a step of training does."""
    for weight in model.parameters():
        weight.add_(torch.randn(weight.shape, generator=generator).to(weight.dtype), alpha=1e-4)


def main(shape: str = "smollm-135m", layers: str = "0", new: str = "96", dtype: str = "bfloat16") -> None:
    """Measure, and print seconds, their ratio, and whether texts were equal."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(3)
    models = dict(zip(("stock", "optimised"), built(shape, int(layers), dtype, generator), strict=True))
    prompts = torch.randint(5, models["stock"].config.vocab_size, (4, ROWS, PROMPT), generator=generator)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    equal = []
    for call, ids in enumerate(prompts):
        texts = {}
        for name in sorted(models, reverse=bool(call % 2)):
            torch.manual_seed(call)
            own = {} if name == "stock" else {"speculative": False}
            start = time.perf_counter()
            texts[name] = models[name].generate(ids, max_new_tokens=int(new), do_sample=True, top_k=0, **own)
            seconds[name].append(time.perf_counter() - start)
        equal.append(torch.equal(texts["stock"], texts["optimised"]))
        change(models["stock"], generator)
    stock, optimised = (sum(times) for times in seconds.values())
    print(f"{shape}, {dtype} ({native.status().isa}): stock {stock:.1f} s, optimised {optimised:.1f} s, "
          f"{stock / optimised:.2f} x; texts equal: {equal}")  # fmt: skip
    print(hf_accel.report(models["optimised"]).rows_left)


if __name__ == "__main__":
    main(*sys.argv[1:])
