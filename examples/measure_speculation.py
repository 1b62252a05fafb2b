"""Measure speculation against plain decoding and against stock, in alternation: `python measure_speculation.py --help`.

Without arguments it takes the embedded demo model as it is, in a few seconds. Figures worth quoting need a model whose
steps cost what real ones do: `--model FOLDER --widen` gives a small trained Llama the cost of a billion parameters.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_accel
from hf_accel.assets import demo_path
from hf_accel.measure.latency import timed_generate
from hf_accel.measure.subjects.widen import LLAMA_1B_COST, widen

# Llama-3.2-1B has a quarter of the key and value heads
SHAPE = LLAMA_1B_COST | {"num_key_value_heads": 16}


def arguments() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=demo_path(), help="folder of a trained Llama")
    parser.add_argument("--draft", help="folder of a smaller model with the same tokenizer, for --drafter model")
    parser.add_argument("--widen", action="store_true", help="give the model the cost of a billion parameters")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument(
        "--drafter", default="lookup", help="lookup, self, layer_skip, model, auto, or several by comma"
    )
    parser.add_argument(
        "--text",
        default="code",
        choices=["code", "edit", "json", "random"],
        help="prompts: code; code whose beginning is asked for again; records; random tokens",
    )
    parser.add_argument("--length", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--files", help="a list of files below the standard library's folder to take prompts from")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new", type=int, default=32, help="new tokens per row")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--stock", action="store_true", help="also time stock transformers and its assisted generation")
    return parser.parse_args()


def records(paths: list[Path]) -> str:
    """Return JSON about files, of the kind a model is asked to go on with."""
    kept = [{"name": path.stem, "kind": "module", "lines": len(path.read_bytes().split()), "path": f"lib/{path.name}"}
            for path in paths]  # fmt: skip
    return json.dumps(kept, indent=1)[:-1]


def make_prompts(options: argparse.Namespace, tokenizer: Any, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    """Return left-padded batches whose rows have different lengths."""
    library = Path(sysconfig.get_paths()["stdlib"])
    names = Path(options.files).read_text().split("\n") if options.files else ["shutil.py", "textwrap.py", "heapq.py"]
    texts = [library / name for name in names if name.endswith(".py") and (library / name).exists()]
    pad = tokenizer.pad_token_id or 0
    found = []
    for number in range(options.prompts):
        rows = []
        for row in range(options.batch):
            index = number * options.batch + row
            if options.text == "random":
                generator = torch.Generator().manual_seed(index)
                ids = torch.randint(5, vocabulary, (options.length,), generator=generator).tolist()
            elif options.text == "json":
                ids = tokenizer(records(texts[index % len(texts) :][:8]))["input_ids"][: options.length]
            else:
                ids = tokenizer(texts[index % len(texts)].read_text(errors="ignore"))["input_ids"][200:]
                if options.text == "edit":
                    again = options.length // 6
                    ids = ids[: options.length - again] + ids[:again]
                ids = ids[: options.length]
            rows.append(ids[3 * row :])
        length = max(map(len, rows))
        ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def main() -> None:
    """Measure and print a line per prompt, then the medians."""
    options = arguments()
    dtype = getattr(torch, options.dtype)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32 if options.widen else dtype)
    if options.widen:
        model = widen(model, SHAPE, dtype)
    draft = AutoModelForCausalLM.from_pretrained(options.draft, dtype=dtype) if options.draft else None
    prompts = make_prompts(options, tokenizer, model.config.vocab_size)
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_k": 0}
    sampling["pad_token_id"] = tokenizer.pad_token_id or 0

    def run(inputs: dict[str, torch.Tensor], **extra: Any) -> tuple[float, torch.Tensor]:
        """Return milliseconds per token after the first, and the ids."""
        torch.manual_seed(0)
        result = timed_generate(model, inputs, options.new, **sampling, **extra)
        arrivals = result.tokens_s  # assisted generation brings several tokens at once
        return 1e3 * sum(arrivals) / (options.new - 1), result.ids

    if options.stock:
        ways: dict[str, dict[str, Any]] = {"stock": {}, "stock lookup": {"prompt_lookup_num_tokens": 8}}
        if draft is not None:
            ways["stock assisted"] = {"assistant_model": draft}
        for name, extra in ways.items():
            if options.batch == 1 or not extra:
                times = [run(inputs, **extra)[0] for inputs in prompts]
                print(f"{name}: {statistics.median(times):.1f} ms per token")

    names = tuple(options.drafter.split(","))
    config = hf_accel.SpeculativeConfig(drafter=names if len(names) > 1 else names[0])
    steps = [step.config for step in hf_accel.plan(model).steps if type(step.config).__name__ != "SpeculativeConfig"]
    start = time.perf_counter()
    hf_accel.optimize(model, [*steps, config], draft_model=draft)
    print(f"set up in {time.perf_counter() - start:.1f} s: {hf_accel.report(model).applied[-1].summary}")
    plain_ms, speculative_ms, ratios = [], [], []
    for number, inputs in enumerate(prompts):
        is_same = True
        for _ in range(options.rounds):
            first, ids = run(inputs)
            second, plain_ids = run(inputs, speculative=False)
            is_same &= torch.equal(ids, plain_ids)
            speculative_ms.append(first)
            plain_ms.append(second)
            ratios.append(second / first)
        print(f"prompt {number}: plain {second:.1f}, speculative {first:.1f} ms per token, same text: {is_same}")
    spread = (max(ratios) - min(ratios)) / 2 / statistics.median(ratios)
    print(
        f"median: plain {statistics.median(plain_ms):.1f}, speculative {statistics.median(speculative_ms):.1f} ms, "
        f"ratio {statistics.median(ratios):.2f} (spread {100 * spread:.0f} %)"
    )
    print(hf_accel.report(model).speculation)
    hf_accel.restore(model)


if __name__ == "__main__":
    main()
