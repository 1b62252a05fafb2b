"""`hf-accel demo`: the embedded trained model, stock and optimised: the same text, and how fast."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.panel import Panel
from rich.text import Text
from transformers import AutoTokenizer

from hf_accel.assets import demo_path
from hf_accel.cli.models import AsJson, load_model, make_plan, use_threads
from hf_accel.cli.output import errors, progress, results, write_json
from hf_accel.cli.tables import footer, speed_table
from hf_accel.errors import CheckpointError, ConfigError
from hf_accel.measure import Bench, Workload, run_bench

PROMPT = '''import os

def find_files(folder, suffix):
    """Return the files in a folder.'''
BUDGET_S = 20.0  # on a busy machine fewer rounds are made, so that the demo stays under a minute
DIFFERENT_TEXT_CODE = 1


def demo(
    prompt: Annotated[str, typer.Option(help="The text to continue; the model has learned Python.")] = PROMPT,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 120,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each state, in alternation.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads torch computes with; so small a model needs one.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Generate with the embedded model, stock and optimised, and compare the texts and the speeds. Needs no network."""
    use_threads(threads)
    if not (demo_path() / "config.json").exists():
        raise CheckpointError("The demo model is missing from this installation of hf-accel. Reinstall the package.")
    model = load_model(str(demo_path()), torch.float32)  # in fp32 equal texts are a promise, not a likelihood
    tokenizer = AutoTokenizer.from_pretrained(demo_path(), local_files_only=True)
    inputs = dict(tokenizer(prompt, return_tensors="pt", return_token_type_ids=False))
    prompt_tokens = inputs["input_ids"].shape[1]
    room = model.config.max_position_embeddings
    if not prompt_tokens or prompt_tokens + new_tokens > room:
        raise ConfigError(
            f"The demo model has room for {room} tokens; the prompt has {prompt_tokens} and {new_tokens} new ones were "
            "asked for. Give a prompt of at least one token, and fewer new tokens."
        )
    plan = make_plan(model, "exact")
    workload = Workload(prompt_tokens=prompt_tokens, new_tokens=new_tokens, rounds=rounds)
    with progress("stock and optimised in alternation", 2 * rounds) as step:
        result = run_bench(
            model, plan, workload, name="the demo model", inputs=inputs, progress=step, budget_s=BUDGET_S
        )
    texts = [str(tokenizer.decode(ids[0, prompt_tokens:])) for ids in (result.stock_ids, result.patched_ids)]
    if as_json:
        write_json({"prompt": prompt, "stock_text": texts[0], "patched_text": texts[1], **result.to_dict()})
    else:
        _show(result, prompt, texts)
    if result.difference is not None:
        raise typer.Exit(DIFFERENT_TEXT_CODE)


def _show(result: Bench, prompt: str, texts: list[str]) -> None:
    stock, patched = (Text(prompt, style="dim").append(text, style="default not dim") for text in texts)
    if result.difference is None:
        results.print(Panel(patched, title="stock and optimised wrote", title_align="left"))
        results.print(f"✓ The same text: all {result.workload.new_tokens} tokens are equal.", style="bold green")
    else:
        results.print(Panel(stock, title="stock wrote", title_align="left"))
        results.print(Panel(patched, title="optimised wrote", title_align="left"))
        errors.print(f"✗ The texts differ. {result.difference}.", style="bold red", highlight=False)
    results.print(speed_table(result))
    results.print(footer(result), highlight=False, soft_wrap=True)
    results.print(str(result.report), markup=False, highlight=False, soft_wrap=True)
