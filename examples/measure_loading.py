"""Measure loading in few bits: `python measure_loading.py write|parts|load|stock|keep FOLDER [SHAPE] [LAYERS]`.

write   random bf16 weights of a named shape (default llama-8b, 16 GB) as safetensors of 2 GB, one file at a time
parts   reading every tensor, and rounding and packing it, each with a clock of its own
load    `hf_accel.load` in 4 bits; the most memory that the process held, and the first token
stock   the same by transformers' `from_pretrained(quantization_config=...)`
keep    `hf_accel.load(cache=True)`: the first run keeps the pack beside FOLDER, the next maps it

Times are of the wall, and of the processor where other programs may have taken the machine.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import hf_accel  # noqa: E402
from hf_accel.kernels.weights import PackedWeight  # noqa: E402
from hf_accel.measure import shape_config  # noqa: E402
from hf_accel.ops.affine import Scheme, quantize  # noqa: E402
from hf_accel.quantization.files.checkpoint import Checkpoint  # noqa: E402
from hf_accel.quantization.files.rebuilding import skeleton  # noqa: E402
from hf_accel.quantization.reading.stream import stored_tensors  # noqa: E402

FOUR = hf_accel.WeightOnlyConfig(bits=4)
FILE_BYTES = 2 << 30


def write(folder: Path, shape: str, layers: int | None) -> None:
    """Write the model. Weights are pieces of one pool of random values, each from a place of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    config = shape_config(shape, layers)
    config.dtype, config.architectures = "bfloat16", ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    model = skeleton(config, torch.bfloat16)
    model.tie_weights()
    pool = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    places: dict[str, str] = {}
    part: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(places.values())):05d}.safetensors"
        save_file(part, folder / name, {"format": "pt"})
        places.update(dict.fromkeys(part, name))
        part.clear()

    for number, (name, parameter) in enumerate(model.named_parameters()):
        size = parameter.numel() * 2
        if part and size + sum(tensor.numel() * 2 for tensor in part.values()) > FILE_BYTES:
            flush()
        turned = pool.roll(number * 7919)
        values = turned.repeat(-(-parameter.numel() // len(pool)))[: parameter.numel()].reshape(parameter.shape)
        part[name] = torch.ones_like(values) if parameter.dim() == 1 else values.clone()
    flush()
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def parts(folder: Path) -> None:
    """Time reading and rounding apart, tensor by tensor."""
    reading, rounding = [0.0, 0.0], [0.0, 0.0]
    for name, stored in stored_tensors(Checkpoint(folder, "model")).items():
        tensor = _timed(partial(stored.__getitem__, ...), reading)
        if len(stored.shape) == 2 and "embed" not in name:
            _timed(partial(_packed, tensor, Scheme(8) if name == "lm_head.weight" else Scheme(4, 64)), rounding)
    print(f"reading {reading[0]:.1f} s (processor {reading[1]:.1f}), rounding {rounding[0]:.1f} s ({rounding[1]:.1f})")


def _packed(tensor: torch.Tensor, scheme: Scheme) -> PackedWeight:
    return PackedWeight.pack(quantize(tensor, scheme, torch.bfloat16))


def _timed(work: Callable[[], Any], total: list[float]) -> Any:
    wall, processor = time.perf_counter(), time.process_time()
    found = work()
    total[0] += time.perf_counter() - wall
    total[1] += time.process_time() - processor
    return found


def load(folder: Path, way: str) -> None:
    """Load, write one token, and tell times and memory."""
    imported = time.perf_counter() - BEGAN
    took = [0.0, 0.0]
    if way == "stock":
        model = _timed(lambda: AutoModelForCausalLM.from_pretrained(folder, quantization_config=FOUR), took)
    else:
        model = _timed(lambda: hf_accel.load(folder, FOUR, cache=way == "keep"), took)
    prompt = torch.tensor([[5, 6, 7, 8]])
    first = [0.0, 0.0]
    token = _timed(lambda: model.generate(prompt, max_new_tokens=1, do_sample=False)[0, -1].item(), first)
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    packed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 1e9
    peak = _peak_bytes() / 1e9
    print(
        f"{way}: importing {imported:.1f} s, loading {took[0]:.1f} s (processor {took[1]:.1f}), first token "
        f"{first[0]:.1f} s ({first[1]:.1f}), in all {time.perf_counter() - BEGAN:.1f} s ({time.process_time():.1f})"
    )
    print(f"packed {packed:.2f} GB, at most {peak:.2f} GB in memory; token {token}")


def _peak_bytes() -> int:
    """Return the most memory this process has held, pages of mapped files included (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    command, place = sys.argv[1], Path(sys.argv[2])
    if command == "write":
        shape, layers = [*sys.argv[3:], "llama-8b", ""][0], sys.argv[4:5]
        write(place, shape, int(layers[0]) if layers else None)
    elif command == "parts":
        parts(place)
    else:
        load(place, command)
