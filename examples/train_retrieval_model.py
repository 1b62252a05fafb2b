"""Train the very small Llama-style model of `hf_accel.measure.subjects.retrieval`, which finds needles in a haystack.

Two layers are enough to copy what followed a token before (induction heads, Olsson et al. 2022, arXiv:2209.11895), and
short prompts teach it fastest: the haystack is doubled each time the model has learned the present one. All data is
drawn at random, nothing is downloaded.

    python examples/train_retrieval_model.py --out my-retrieval-model
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from hf_accel.measure.subjects.retrieval import (
    ASK,
    FILLER,
    KEYS,
    MAX_NEEDLES,
    MAX_TOKENS,
    PAD,
    START,
    VALUES,
    VALUES_PER_KEY,
    VOCABULARY,
    measure_retrieval,
    retrieval_tasks,
)

NEEDLE_TOKENS = 1 + VALUES_PER_KEY
FIRST_TOKENS, BATCH_TOKENS = 32, 4096
LEARNED = 0.985  # Smoothed accuracy at which the haystack is doubled.
PEAK_RATE, WARMUP_STEPS, CLIP_NORM = 3e-3, 100, 1.0
LAST_STEPS = 300  # At the full length, with a rate that falls to a twentieth.
MAX_STEPS = 10_000  # The shipped model took 2,123.
IGNORED_TARGET = -100  # What `cross_entropy` leaves out of its mean.


def new_model() -> LlamaForCausalLM:
    """A model of two layers, about 107,000 weights; heads are wider than usual, since they must tell places apart."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2 * MAX_TOKENS,
        tie_word_embeddings=True,
        initializer_range=0.0625,
        bos_token_id=START,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def sample(values: range, rows: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` different ones of `values` for each row `(rows, count)`."""
    return torch.rand(rows, len(values), generator=generator).argsort(dim=1)[:, :count] + values.start


def haystacks(rows: int, tokens: int, needles: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, both `(rows, T)`: a haystack of `tokens`, then every needle is asked for and answered.

    Only values after a question are targets. Many questions of one haystack are many lessons of one pass.
    """
    text = torch.randint(FILLER.start, FILLER.stop, (rows, tokens), generator=generator)
    text[:, 0] = START
    keys = sample(KEYS, rows, needles, generator)[:, :, None]
    values = sample(VALUES, rows, needles * VALUES_PER_KEY, generator).view(rows, needles, VALUES_PER_KEY)
    needle = torch.cat([keys, values], dim=2)
    free = tokens - 1 - needles * NEEDLE_TOKENS
    gaps = torch.randint(free + 1, (rows, needles), generator=generator).sort(dim=1).values
    starts = 1 + gaps + NEEDLE_TOKENS * torch.arange(needles)
    places = starts[:, :, None] + torch.arange(NEEDLE_TOKENS)
    text.scatter_(1, places.flatten(1), needle.flatten(1))
    order = torch.rand(rows, needles, generator=generator).argsort(dim=1)
    asked = needle.gather(1, order[:, :, None].expand_as(needle))
    questions = torch.cat([torch.full((rows, needles, 1), ASK), asked], dim=2)
    scored = questions.clone()
    scored[:, :, :2] = IGNORED_TARGET
    inputs = torch.cat([text, questions.flatten(1)], dim=1)
    targets = torch.cat([torch.full_like(text, IGNORED_TARGET), scored.flatten(1)], dim=1)
    return inputs[:, :-1], targets[:, 1:]


def train(model: LlamaForCausalLM, generator: torch.Generator) -> int:
    """Train `model` in place until it has learned every length; the number of steps it took.

    Raises typer.Exit when it has not after `MAX_STEPS`.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    tokens, accuracy, reached = FIRST_TOKENS, 0.0, 0
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    with Progress(*columns) as progress:
        stages = (MAX_TOKENS // FIRST_TOKENS).bit_length()
        task = progress.add_task("training", total=stages, note="")
        for step in range(1, MAX_STEPS + 1):
            is_last = tokens == MAX_TOKENS
            done = (step - reached) / LAST_STEPS if is_last else 0.0
            for group in optimizer.param_groups:
                group["lr"] = PEAK_RATE * min(1.0, step / WARMUP_STEPS) * ((0.5 - 0.45 * done) if is_last else 1.0)
            most = min(MAX_NEEDLES, (tokens - 1) // (NEEDLE_TOKENS + 1))
            # Full haystacks have most lessons, sparse ones are what is measured.
            needles = int(torch.randint(1, most + 1, (1,), generator=generator)) if step % 2 else most
            rows = max(4, BATCH_TOKENS // (tokens + needles * (NEEDLE_TOKENS + 1)))
            inputs, targets = haystacks(rows, tokens, needles, generator)
            logits = model(input_ids=inputs, use_cache=False).logits
            loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TARGET)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scored = targets != IGNORED_TARGET
            accuracy = 0.95 * accuracy + 0.05 * float((logits.argmax(-1) == targets)[scored].float().mean())
            note = f"step {step:,}, {tokens:,} tokens, {loss.item():.4f} nats/token, {100 * accuracy:.1f} % right"
            progress.update(task, note=note)
            if step % 100 == 0:
                progress.console.print(note)
            if is_last and done >= 1.0:
                return step
            if not is_last and accuracy > LEARNED:
                tokens, accuracy, reached = 2 * tokens, 0.5, step
                progress.advance(task)
    typer.echo(f"not learned after {MAX_STEPS:,} steps; try another --seed", err=True)
    raise typer.Exit(1)


def main(
    out: Annotated[Path, typer.Option(help="Folder that gets the model.")],
    seed: Annotated[int, typer.Option(help="Seed of the first weights and of all data.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """Train the retrieval model and print how many needles it finds."""
    console = Console()
    disable_progress_bar()  # Of loading and saving, which take no time here.
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model = new_model()
    steps = train(model, torch.Generator().manual_seed(seed + 1))
    model.generation_config = GenerationConfig(do_sample=False, bos_token_id=START, pad_token_id=PAD)
    out.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(out)
    console.print(f"{steps:,} steps; {sum(path.stat().st_size for path in out.iterdir()):,} bytes in {out}")
    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32, local_files_only=True).eval()
    for tokens in (128, 256, 512, MAX_TOKENS):
        console.print(f"{tokens:5,} tokens: {measure_retrieval(model, retrieval_tasks(tokens, repeats=20, seed=9))}")


if __name__ == "__main__":
    typer.run(main)
