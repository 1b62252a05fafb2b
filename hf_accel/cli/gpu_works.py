"""What `hf-accel bench --suite gpu` measures: one method per work, each beside stock or beside its floor.

A time per token is the difference of two whole calls over the tokens between them, so that neither prompts nor what a
call costs once is in it, and a loop that runs ahead of the host is not held up by a clock. Stock is measured before and
after.
"""

from __future__ import annotations

import gc
import multiprocessing
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

import hf_accel
from hf_accel.api import optimized
from hf_accel.assets import demo_path
from hf_accel.cache import KVCacheConfig
from hf_accel.cli.models import load_model, untimed_plan
from hf_accel.core.config import Config
from hf_accel.core.model.anatomy import Anatomy
from hf_accel.measure import build_shape, random_prompt, read_bandwidth
from hf_accel.measure.latency import PLAIN
from hf_accel.measure.subjects.widen import LLAMA_1B_COST, widen
from hf_accel.measure.suite import Row, Work
from hf_accel.quantization import WeightOnlyConfig
from hf_accel.speculative import SpeculativeConfig

PROMPT = "import os\n\ndef find_files(folder, suffix):\n"
TESTS_S = 240  # the longest that the marked tests may take


@dataclass(frozen=True)
class Call:
    """A greedy `generate` call to time.

    few, many: new tokens of the two calls whose difference is timed; few 0: a single call, the whole of it.
    """

    prompt: int
    batch: int = 1
    few: int = 4
    many: int = 36


@dataclass
class GpuWorks:
    """The works for one shape on one device; the model is built when it is first asked for, and shared.

    prompts: tokens of a short and a long prompt. long: tokens at which a cache in few bits is measured.
    wide: the shape that the embedded trained model is widened to for speculation.
    """

    shape: str = "llama-8b"
    device: str = "cuda"
    rounds: int = 3
    prompts: tuple[int, int] = (128, 4096)
    batch: int = 32
    long: int = 32768
    new_tokens: int = 32
    wide: dict[str, int] | None = None
    _model: PreTrainedModel | None = None

    def works(self) -> dict[str, Work]:
        """Return the works by name, those that matter most first."""
        short, long = self.prompts
        return {
            "gpu tests": self.tests,
            f"decode, prompt {short}": lambda: self.decode(short),
            f"decode, prompt {long}": lambda: self.decode(long),
            "decode in 4 bits": lambda: self.few_bits(4),
            "cache in few bits": self.cached,
            f"batch of {self.batch}": lambda: self.decode(short, self.batch),
            "prefill": self.prefill,
            "speculation": self.speculation,
            "decode in 8 bits": lambda: self.few_bits(8),
            "first token": self.cold,
            "stock, compiled": self.compiled,
        }

    def tests(self) -> list[Row]:
        """Count what becomes of the tests marked gpu, where they lie beside the package."""
        folder = Path(hf_accel.__file__).parents[1]
        if not (folder / "tests" / "conftest.py").exists():
            return [Row("gpu tests", note="not installed beside the package")]
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-p", "no:cacheprovider", "tests"]
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TESTS_S, check=False)
        last = ran.stdout.strip().rpartition("\n")[2]
        counts = {word: float(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
        failed = [line for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return [Row("gpu tests", counts, "; ".join(failed), None if ran.returncode in (0, 5) else last or ran.stderr)]

    def decode(self, prompt: int, batch: int = 1) -> list[Row]:
        """Time a token of stock and of all exact steps."""
        call = Call(prompt, batch, many=4 + self.new_tokens)
        figures = self._beside_stock(call)
        bound = self._floor_ms()
        figures |= {"weights read once, ms": bound, "share": bound / figures["ours ms"]}
        return [Row(f"decode, batch {batch}, prompt {prompt}", figures)]

    def few_bits(self, bits: int) -> list[Row]:
        """Time a token with weights in few bits."""
        config = WeightOnlyConfig(bits=bits, group_size=128 if bits == 4 else None)
        call = Call(self.prompts[0], many=4 + self.new_tokens)
        with optimized(self.model, untimed_plan(self.model, [config])) as model:
            bound = self._floor_ms()
            ms = self._median(model, call)
        figures = {"ours ms": ms, "tokens/s": 1e3 / ms, "weights read once, ms": bound, "share": bound / ms}
        return [Row(f"decode in {bits} bits, prompt {call.prompt}", figures)]

    def cached(self) -> list[Row]:
        """Time a token after a very long prompt, with keys and values as they are and in 8 and 4 bits."""
        rows = []
        for bits in (None, 8, 4):
            configs: list[Config] = [] if bits is None else [KVCacheConfig(bits=bits)]
            with optimized(self.model, untimed_plan(self.model, configs)) as model:
                ms = self._median(model, Call(self.long, many=4 + self.new_tokens))
            rows.append(Row(f"decode, cache in {bits or 16} bits, {self.long} tokens", {"ours ms": ms}))
        return rows

    def prefill(self) -> list[Row]:
        """Time a call for one token after a long prompt."""
        return [Row(f"prefill {self.prompts[1]}", self._beside_stock(Call(self.prompts[1], few=0, many=1)))]

    def speculation(self) -> list[Row]:
        """Time a token with and without drafts, of the embedded trained model at the cost of a larger one."""
        self.free()
        small: Any = load_model(str(demo_path()), torch.float32, self.device)
        model: Any = widen(small, LLAMA_1B_COST if self.wide is None else self.wide, torch.bfloat16)
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        tokenizer = AutoTokenizer.from_pretrained(demo_path(), local_files_only=True)
        ids = tokenizer(PROMPT, return_tensors="pt").input_ids.to(self.device)
        ways: dict[str, list[Config]] = {"plain": []}
        ways |= {drafter: [SpeculativeConfig(drafter=drafter)] for drafter in ("lookup", "self")}
        figures = {}
        for name, configs in ways.items():
            with optimized(model, untimed_plan(model, configs)):
                figures[f"{name} ms"] = self._median(model, Call(ids.shape[1], many=4 + 4 * self.new_tokens), ids)
        figures |= {f"{name} ratio": figures["plain ms"] / figures[f"{name} ms"] for name in ways if name != "plain"}
        return [Row("speculation, a trained model at the cost of a large one", figures)]

    def cold(self) -> list[Row]:
        """Time the first call for one token in a process of its own, once the model is built and optimised."""
        self.free()
        figures = {}
        for name, is_ours in {"stock": False, "ours": True}.items():
            context = multiprocessing.get_context("spawn")
            with context.Pool(1) as pool:
                figures[f"{name} ms"] = 1e3 * pool.apply(_cold_s, (self.shape, self.device, is_ours, self.prompts[0]))
        return [Row("first token, cold", figures | {"ratio": figures["stock ms"] / figures["ours ms"]})]

    def compiled(self) -> list[Row]:
        """Time a token of stock with its static cache, which transformers compiles on a GPU, after its warm-up."""
        start = time.perf_counter()
        call = Call(self.prompts[0], many=4 + self.new_tokens)
        seconds = timed(self.model, call, self._prompt(call), cache_implementation="static")
        seconds()
        figures = {"warm-up s": time.perf_counter() - start}
        figures["stock ms"] = 1e3 * statistics.median(seconds() for _ in range(self.rounds))
        return [Row(f"decode, prompt {call.prompt}, stock with static cache, compiled", figures)]

    def free(self) -> None:
        """Give the model up."""
        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def model(self) -> PreTrainedModel:
        """The shape in bf16 with random weights."""
        if self._model is None:
            self._model = build_shape(self.shape, torch.bfloat16, self.device)
        return self._model

    def _prompt(self, call: Call) -> torch.Tensor:
        return random_prompt(self.model, call.prompt, call.batch)

    def _floor_ms(self) -> float:
        return 1e3 * Anatomy.of(self.model).read_bytes / read_bandwidth(self.device)

    def _median(self, model: Any, call: Call, ids: torch.Tensor | None = None) -> float:
        seconds = timed(model, call, self._prompt(call) if ids is None else ids)
        seconds()  # captures and tunes
        return 1e3 * statistics.median(seconds() for _ in range(self.rounds))

    def _beside_stock(self, call: Call) -> dict[str, float]:
        before = self._median(self.model, call)
        with optimized(self.model, untimed_plan(self.model, [])) as model:
            ours = self._median(model, call)
        stock = statistics.mean((before, self._median(self.model, call)))
        return {"stock ms": stock, "ours ms": ours, "ratio": stock / ours}


def timed(model: Any, call: Call, ids: torch.Tensor, **options: Any) -> Callable[[], float]:
    """Return a function that measures seconds per token; of the whole call where `few` is 0."""

    def whole(new: int) -> float:
        if ids.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(ids, **(PLAIN | {"max_new_tokens": new, "min_new_tokens": new} | options))
        if ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return lambda: (whole(call.many) - whole(call.few)) / (call.many - call.few) if call.few else whole(call.many)


def _cold_s(shape: str, device: str, is_ours: bool, prompt: int) -> float:
    model = build_shape(shape, torch.bfloat16, device)
    if is_ours:
        hf_accel.optimize(model, untimed_plan(model, []))
    return timed(model, Call(prompt, few=0, many=1), random_prompt(model, prompt))()
