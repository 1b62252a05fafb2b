"""Measure the key/value cache, everything in alternation: `python measure_cache.py decode|quality|disk|prefix|evict`.

decode   a token at a long context: stock's cache, ours as it is, in 8 and in 4 bits (random weights: speed only)
quality  perplexity of a trained model with 8 and 4 bits, on the standard library's sources
disk     a long context within a budget of memory, the rest in a file; the process is watched from outside
prefix   time to the first token of a second call that begins like the first
evict    retrieval by a small trained model, by method and compression
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

import hf_accel
from hf_accel import (
    AttentionConfig,
    DecoderBlockConfig,
    DecodingConfig,
    KVCacheConfig,
    NativeLinearConfig,
    WeightOnlyConfig,
)
from hf_accel.assets import demo_path
from hf_accel.cache.assembly import CacheAssembly
from hf_accel.cache.codec import Codec
from hf_accel.cache.probing import ModelShapes
from hf_accel.cache.statistics import CacheStatistics
from hf_accel.core.config import Config
from hf_accel.core.drift import CACHE
from hf_accel.measure import build_shape
from hf_accel.measure.subjects.retrieval import measure_retrieval, retrieval_model, retrieval_tasks

EXACT: list[Config] = [NativeLinearConfig(), DecoderBlockConfig(), AttentionConfig(), KVCacheConfig(), DecodingConfig()]


def arguments() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["decode", "quality", "disk", "disk-child", "prefix", "evict"])
    parser.add_argument("--shape", default="llama-1b", help="decode, prefix: a shape with random weights")
    parser.add_argument("--weights", type=int, choices=[8, 4], help="decode, prefix: bits of the weights; none: bf16")
    parser.add_argument("--model", default=demo_path(), help="quality: folder of a trained model")
    parser.add_argument("--files", help="quality: a list of files below the standard library's folder")
    parser.add_argument("--tokens", type=int, help="length of the context")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new", type=int, default=16, help="disk: new tokens")
    parser.add_argument("--chunk", type=int, default=128, help="disk: tokens of the prompt that are read at a time")
    parser.add_argument("--cold", action="store_true", help="disk: nothing of the file stays in the page cache")
    parser.add_argument("--budget", type=int, default=64 << 20, help="disk: bytes of memory")
    parser.add_argument("--config", help="disk-child: what the cache is, as JSON")
    return parser.parse_args()


def filled(model: Any, tokens: int, batch: int, bits: int | None, is_stock: bool) -> DynamicCache:
    """Return a cache of random keys and values, with room for the tokens that are timed."""
    config = model.config
    cache = DynamicCache(config=config)
    if not is_stock:
        CacheAssembly(KVCacheConfig(), ModelShapes(), CacheStatistics()).replace(cache, tokens + 64, Codec(bits))
    generator = torch.Generator().manual_seed(0)
    shape = (batch, config.num_key_value_heads, tokens, config.head_dim)
    for layer in cache.layers:
        layer.update(*(torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(2)))
    return cache


@torch.inference_mode()
def decode(options: argparse.Namespace) -> None:
    """Time one token by every cache, over the same weights."""
    tokens = options.tokens or 8192
    stock = build_shape(options.shape, torch.bfloat16)
    ours = LlamaForCausalLM(stock.config)  # on the same weights: no second copy
    ours = ours.to(torch.bfloat16)
    ours.load_state_dict(stock.state_dict(), assign=True)
    ours.tie_weights()
    ours.eval()
    configs = EXACT if options.weights is None else [WeightOnlyConfig(bits=options.weights), *EXACT]
    hf_accel.optimize(ours, configs)
    kinds: dict[str, tuple[Any, DynamicCache]] = {
        "stock": (stock, filled(stock, tokens, options.batch, None, True)),
        **{
            name: (ours, filled(ours, tokens, options.batch, bits, False))
            for name, bits in (("as it is", None), ("8 bits", 8), ("4 bits", 4))
        },
    }
    ids = torch.ones((options.batch, 1), dtype=torch.long)
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(options.rounds):
        for name, (model, cache) in kinds.items():
            start = time.perf_counter()
            model(input_ids=ids, use_cache=True, **{CACHE: cache})
            times[name].append(1000 * (time.perf_counter() - start))
    for name, found in times.items():
        middle = statistics.median(found)
        ratios = [statistics.median(times[other]) / middle for other in ("stock", "as it is")]
        print(f"{name:9s} {middle:7.1f} ms per token ({min(found):.1f}-{max(found):.1f}), "
              f"{ratios[0]:.2f} x stock, {ratios[1]:.2f} x as it is")  # fmt: skip


@torch.inference_mode()
def quality(options: argparse.Namespace) -> None:
    """Print perplexities; the text is read with the cache, so that attention sees what is kept."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    library = Path(sysconfig.get_paths()["stdlib"])
    names = Path(options.files).read_text().split() if options.files else ["argparse.py", "tarfile.py", "typing.py"]
    text = "\n\n".join((library / name).read_text() for name in names if (library / name).exists())
    ids = torch.tensor(tokenizer(text[:150_000])["input_ids"])
    for tokens in [options.tokens] if options.tokens else (512, 1024, 2048):
        if tokens > model.config.max_position_embeddings:
            continue
        rows = ids[: min(len(ids) // tokens, max(6, 12288 // tokens)) * tokens].view(-1, tokens)
        found: dict[int | None, float] = {}
        for bits in (None, 8, 4):
            total = 0.0
            for row in rows:
                cache = DynamicCache(config=model.config)
                CacheAssembly(KVCacheConfig(), ModelShapes(), CacheStatistics()).replace(cache, tokens, Codec(bits))
                logits = model(input_ids=row[None], use_cache=True, **{CACHE: cache}).logits[0, :-1]
                total += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
            found[bits] = math.exp(total / (rows.numel() - len(rows)))
        changes = ", ".join(f"{bits} bits {100 * (found[bits] / found[None] - 1):+.3f} %" for bits in (8, 4))
        print(f"context {tokens}: perplexity {found[None]:.4f}; {changes} ({rows.numel()} tokens)")


def long_model() -> Any:
    """Return a small model whose keys and values take 2 KiB per token."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=64, vocab_size=512, max_position_embeddings=1 << 17,
                         initializer_range=0.08, eos_token_id=None)  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def disk_child(options: argparse.Namespace) -> None:
    """Generate after a long prompt, read in pieces; print tokens, times and what the process held at most."""
    model = hf_accel.optimize(long_model(), EXACT)
    tokens = options.tokens or 65536
    ids = torch.randint(0, 512, (1, tokens), generator=torch.Generator().manual_seed(1))
    model.generate(ids[:, :600], max_new_tokens=4, do_sample=False)  # what libraries load lazily counts before
    print("ready", flush=True)
    times: list[float] = []

    class Clock:
        def put(self, value: Any) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            times.append(time.perf_counter())

    config = Config.from_dict(json.loads(options.config))
    result = model.generate(
        ids,
        max_new_tokens=options.new,
        do_sample=False,
        prefill_chunk_size=options.chunk,
        kv_cache=config,
        streamer=Clock(),
    )
    steps = sorted(b - a for a, b in zip(times[2:-2], times[3:-1], strict=True))
    held = hf_accel.report(model).kv_cache
    found = {"new": result[0, tokens:].tolist(), "prompt_s": times[1] - times[0]}
    found |= {"step_ms": 1000 * statistics.median(steps), "held": dict(held.peak_bytes) if held else {}}
    print(json.dumps(found))


def drop_pages(process: psutil.Process) -> None:
    """Have the system forget what it holds in memory of the files without a name that a process has open (Linux)."""
    for link in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if os.readlink(link).endswith("(deleted)"):
                file = os.open(link, os.O_RDONLY)
                os.fdatasync(file)  # pages that were never written cannot be dropped
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(file)


def watched(command: list[str], is_cold: bool) -> dict[str, Any]:
    """Return what a process prints, and by how many bytes its resident memory grew at most after it said "ready"."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        output: Any = child.stdout
        output.readline()
        process = psutil.Process(child.pid)
        before = peak = process.memory_info().rss
        while child.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                peak = max(peak, process.memory_info().rss)
                if is_cold:
                    drop_pages(process)
            time.sleep(0.005)
        if child.returncode:
            raise subprocess.CalledProcessError(child.returncode, command)
        return json.loads(output.read()) | {"grew_bytes": peak - before}


def disk(options: argparse.Namespace) -> None:
    """Compare a cache without limits to one within a budget, with and without prefetch."""
    within = {"type": "KVCacheConfig", "store": "disk", "device_budget_bytes": options.budget}
    runs = {
        "unlimited": {"type": "KVCacheConfig"},
        "budget": within,
        "budget, no prefetch": within | {"prefetch": False},
        "budget, 8 bits": within | {"bits": 8},
    }
    expected = None
    for name, config in runs.items():
        command = [sys.executable, __file__, "disk-child", "--config", json.dumps(config), "--new", str(options.new)]
        command += ["--tokens", str(options.tokens or 65536), "--chunk", str(options.chunk)]
        found = watched(command, options.cold)
        expected = expected or found["new"]
        print(f"{name:20s} {found['step_ms']:7.1f} ms per token, prompt {found['prompt_s']:6.1f} s, resident memory "
              f"grew by {found['grew_bytes'] / 2**20:6.1f} MiB, held {found['held']}, "
              f"{'same tokens' if found['new'] == expected else 'other tokens'}", flush=True)  # fmt: skip


def prefix(options: argparse.Namespace) -> None:
    """Time the first token of prompts that share their beginning with one before."""
    tokens = options.tokens or 2048
    model = build_shape(options.shape, torch.bfloat16)
    configs = EXACT if options.weights is None else [WeightOnlyConfig(bits=options.weights), *EXACT]
    hf_accel.optimize(model, configs)
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(10, 10_000, (1, tokens), generator=generator)
    reuse = KVCacheConfig(prefix_reuse=True, prefix_budget_bytes=1 << 30)
    first: dict[str, list[float]] = {"computed": [], "reused": []}
    for number in range(max(2, options.rounds // 2)):
        ids = torch.cat([shared, torch.randint(10, 10_000, (1, 32), generator=generator)], dim=1)
        if number == 0:
            model.generate(ids[:, :-16], max_new_tokens=1, do_sample=False, kv_cache=reuse)
        for name, config in (("computed", KVCacheConfig()), ("reused", reuse)):
            start = time.perf_counter()
            model.generate(ids, max_new_tokens=1, do_sample=False, kv_cache=config)
            first[name].append(time.perf_counter() - start)
        # cut at the same place: the last tokens alone go through kernels that round in another order
        texts = [
            model.generate(ids, max_new_tokens=4, do_sample=False, **way)
            for way in ({"kv_cache": KVCacheConfig(), "prefill_chunk_size": tokens}, {"kv_cache": reuse})
        ]
        print(f"  {'same' if torch.equal(*texts) else 'other'} tokens", flush=True)
    computed, reused = (statistics.median(found) for found in first.values())
    print(f"first token after {tokens} shared and 32 new tokens: {computed:.3f} s computed, {reused:.3f} s reused, "
          f"{computed / reused:.1f} x sooner")  # fmt: skip


def evict(options: argparse.Namespace) -> None:
    """Print how much a model retrieves from what evictions leave."""
    model = hf_accel.optimize(retrieval_model(), [AttentionConfig(), KVCacheConfig(), DecodingConfig()])
    tokens = options.tokens or 512
    tasks = retrieval_tasks(tokens=tokens, repeats=10, seed=11)
    configs: dict[str, KVCacheConfig] = {"everything": KVCacheConfig()}
    configs |= {f"{bits} bits": KVCacheConfig(bits=bits) for bits in (8, 4)}
    for share in (2, 4, 8):
        keep = tokens // share
        configs[f"streaming, 1/{share}"] = KVCacheConfig(window=keep - 4, sinks=4)
        for method in ("snapkv", "h2o", "tova", "key-norm"):
            configs[f"{method}, 1/{share}"] = KVCacheConfig(eviction=method, kept_tokens=keep, window=16, sinks=4)
    for name, config in configs.items():
        print(f"{name:20s} {measure_retrieval(model, tasks, kv_cache=config)}", flush=True)


def main() -> None:
    """Run what was asked for."""
    options = arguments()
    measurements = {
        "decode": decode,
        "quality": quality,
        "disk": disk,
        "disk-child": disk_child,
        "prefix": prefix,
        "evict": evict,
    }
    measurements[options.what](options)


if __name__ == "__main__":
    main()
