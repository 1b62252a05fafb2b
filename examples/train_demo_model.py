"""Train the small Llama-style model that `hf-accel demo` runs, on text every machine has.

The text is the Python standard library's own sources, so nothing is downloaded and no data set is stored.
A few per cent of the files are held out and the mean loss on them is printed at the end.

    python examples/train_demo_model.py --out my-demo-model --minutes 28

An interrupted run continues from `<out>.checkpoint.pt` when the same command is given again.
"""

import hashlib
import math
import sysconfig
import time
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

END_TOKEN, PAD_TOKEN = "<|endoftext|>", "<|pad|>"
VOCAB_TOKENS, MAX_CONTEXT_TOKENS = 1536, 1024
# `encodings` is character tables, nearly the same in a hundred files; the others are tests or bulky generated code.
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "__pycache__"}
MAX_FILE_BYTES = 200_000
HELD_OUT_SHARE, HELD_OUT_WINDOW_TOKENS = 0.03, 512
BATCH_TOKENS = 2048
# From which share of the run on windows have how many tokens: short ones are cheaper and teach syntax, long ones near
# the end teach the model to use its whole context.
WINDOW_TOKENS_FROM = ((0.0, 256), (0.7, 512), (0.9, MAX_CONTEXT_TOKENS))
# See `with_stutters`; early on there is no copying to unlearn.
STUTTER_SHARE, STUTTER_FROM, MAX_STUTTER_TOKENS, MAX_STUTTER_COPIES = 0.3, 0.5, 64, 6
IGNORED_TARGET = -100  # What `cross_entropy` leaves out of its mean.
PEAK_RATE, WARMUP_SHARE, CLIP_NORM = 3e-3, 0.03, 1.0
SECONDS_BETWEEN_CHECKPOINTS = 60.0
Loss = Callable[[PreTrainedModel, torch.Tensor, torch.Tensor], torch.Tensor]  # of a model, inputs and targets


@dataclass
class TrainingState:
    """How far a run has come; everything else it needs is in the model, the optimizer and the generator."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    smoothed_loss: float = math.nan


def read_sources(folder: Path) -> dict[str, str]:
    """The text of each `.py` file under `folder` by its relative path; undecodable files are left out.

    Raises typer.BadParameter when fewer than two files are left, since one is needed for each side of the split.
    """
    sources = {}
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        # `_sysconfigdata*` records the build paths of one machine.
        if SKIPPED_FOLDERS & set(name.parts[:-1]) or name.name.startswith("_sysconfigdata"):
            continue
        if 0 < path.stat().st_size <= MAX_FILE_BYTES:
            try:
                with tokenize.open(path) as file:
                    sources[name.as_posix()] = file.read()
            except (SyntaxError, UnicodeDecodeError):
                continue
    if len(sources) < 2:
        raise typer.BadParameter(f"{folder} has {len(sources)} usable .py files; at least 2 are needed")
    return sources


def split_held_out(sources: dict[str, str]) -> tuple[list[str], list[str]]:
    """(training texts, held-out texts). A hash of the path decides, so the split is the same wherever the files are."""
    ranked = sorted(sources, key=lambda name: hashlib.sha256(name.encode()).digest())
    count = max(1, round(HELD_OUT_SHARE * len(ranked)))
    return [sources[name] for name in ranked[count:]], [sources[name] for name in ranked[:count]]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `VOCAB_TOKENS` entries: any text round-trips, there is no unknown token.

    A line feed is always a token of its own. Merged with the indentation after it, as GPT-2's rules would have it, a
    prompt that ends with a line feed would be unlike all training text and make the model think of an empty line.
    """
    bpe = Tokenizer(models.BPE())
    lines, words = pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([lines, words])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_TOKENS,
        special_tokens=[END_TOKEN, PAD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_TOKEN,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=MAX_CONTEXT_TOKENS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one row of token ids `(tokens,)`, each text opened by the end-of-text token."""
    ids: list[int] = []
    for text in texts:
        ids += [tokenizer.eos_token_id, *tokenizer(text, verbose=False)["input_ids"]]
    return torch.tensor(ids)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Untrained: L=5, E=192, H=6, G=2, D=32, inner size 384, tied embeddings; 1.9 M weights, 3.8 MB in bfloat16."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=384,
            num_hidden_layers=5,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=MAX_CONTEXT_TOKENS,
            initializer_range=0.04,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_optimizer(model: PreTrainedModel) -> torch.optim.AdamW:
    """AdamW that decays matrices only: decaying norm weights towards zero would only fight their purpose."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)


def learning_rate(done: float) -> float:
    """The rate after the share `done` (0 to 1) of the run: linear warm-up, then a half cosine down to a hundredth."""
    if done < WARMUP_SHARE:
        return PEAK_RATE * (done / WARMUP_SHARE + 0.01) / 1.01
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, (done - WARMUP_SHARE) / (1.0 - WARMUP_SHARE))))
    return PEAK_RATE * (0.01 + 0.99 * cosine)


def random_windows(ids: torch.Tensor, window_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Windows `(B, window_tokens)` cut at random places of `ids`."""
    window_tokens = min(window_tokens, len(ids))
    starts = torch.randint(len(ids) - window_tokens + 1, (BATCH_TOKENS // window_tokens, 1), generator=generator)
    return ids[starts + torch.arange(window_tokens)]


def with_stutters(windows: torch.Tensor, share: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, both `(B, T - 1)`, of `windows` `(B, T)`, where a `share` of the rows repeats some text.

    A small model that decodes greedily soon repeats itself without end. So some rows show a piece several times over,
    with the text that truly follows it as the target after *each* copy; what happens inside the copies is not scored.
    (Xu et al. 2022, arXiv:2206.02369, unlearn such loops with a loss of their own; here the data alone does it.)
    """
    window_tokens = windows.shape[1]
    inputs, targets = windows.clone(), windows.roll(-1, dims=1)
    for row, window in enumerate(windows):
        chance, size, place, number = torch.rand(4, generator=generator).tolist()
        if chance >= share:
            continue
        piece = int(min(MAX_STUTTER_TOKENS, window_tokens // 4) ** size)
        end = piece + int(place * (window_tokens - 2 * piece))
        copies = 1 + int(number * min(MAX_STUTTER_COPIES, (window_tokens - 1 - end) // piece))
        again = window[end - piece : end].repeat(copies)
        inputs[row] = torch.cat([window[:end], again, window[end:]])[:window_tokens]
        targets[row] = inputs[row].roll(-1)
        targets[row, end - 1 : end + len(again) - 1] = IGNORED_TARGET
        targets[row, end - 1 : end + len(again) : piece] = window[end]
    return inputs[:, :-1], targets[:, :-1]


def mean_loss(model: PreTrainedModel, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean nats per scored target; `inputs` and `targets` are `(B, T)`, a target follows the input at its place."""
    logits = model(input_ids=inputs, use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED_TARGET)


def train(
    model: PreTrainedModel,
    ids: torch.Tensor,
    minutes: float,
    max_steps: int | None,
    seed: int,
    checkpoint: Path,
    loss_of: Loss | None = None,
) -> TrainingState:
    """Train `model` in place for `minutes`, or exactly `max_steps` steps; continues from `checkpoint` if it exists.

    With `max_steps` the schedule follows the steps and the result repeats on one machine; without, it follows the
    clock, so that a busy machine ends its run with a small learning rate too. `loss_of` replaces `mean_loss`. Raises
    typer.BadParameter when the checkpoint is of another seed or text.
    """
    optimizer, generator, state = new_optimizer(model), torch.Generator().manual_seed(seed), TrainingState()
    run = f"{seed} {hashlib.sha256(ids.numpy().tobytes()).hexdigest()}"

    def save() -> None:
        record: dict[str, Any] = {"run": run, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        record |= {"generator": generator.get_state(), "state": vars(state)}
        part = checkpoint.with_suffix(".part")
        torch.save(record, part)
        part.replace(checkpoint)  # Atomic: an interruption leaves the old checkpoint or the new one.

    if checkpoint.exists():
        record = torch.load(checkpoint)
        if record["run"] != run:
            raise typer.BadParameter(f"{checkpoint} is of another seed or text; delete it or choose another --out")
        model.load_state_dict(record["model"])
        optimizer.load_state_dict(record["optimizer"])
        generator.set_state(record["generator"])
        state = TrainingState(**record["state"])
    model.train()
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=1.0, note="")
        saved_at, began = state.seconds, time.perf_counter() - state.seconds
        while True:
            done = state.step / max_steps if max_steps else state.seconds / (60.0 * minutes)
            note = f"step {state.step:,}, {state.tokens:,} tokens, {state.smoothed_loss:.3f} nats/token"
            progress.update(task, completed=min(done, 1.0), note=note)
            if done >= 1.0 or state.seconds - saved_at >= SECONDS_BETWEEN_CHECKPOINTS:
                save()
                saved_at = state.seconds
                progress.console.print(f"{state.seconds:6.0f} s  {note}")
            if done >= 1.0:
                return state
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(done)
            window_tokens = [tokens for share, tokens in WINDOW_TOKENS_FROM if done >= share][-1]
            windows = random_windows(ids, window_tokens, generator)
            share = STUTTER_SHARE if done >= STUTTER_FROM else 0.0
            loss = (loss_of or mean_loss)(model, *with_stutters(windows, share, generator))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            state.tokens += windows.numel()
            state.smoothed_loss = loss.item() if state.step == 1 else 0.98 * state.smoothed_loss + 0.02 * loss.item()
            state.seconds = time.perf_counter() - began


@torch.inference_mode()
def held_out_loss(folder: Path, ids: torch.Tensor, max_tokens: int) -> tuple[float, int]:
    """(mean nats per token, tokens predicted) of the model saved at `folder` on `ids` cut to `max_tokens`, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    total, count = 0.0, 0
    ids = ids[:max_tokens]
    for window in ids.split(HELD_OUT_WINDOW_TOKENS):
        if len(window) > 1:
            total += mean_loss(model, window[None, :-1], window[None, 1:]).item() * (len(window) - 1)
            count += len(window) - 1
    return total / count, count


def main(
    out: Annotated[Path, typer.Option(help="Folder that gets the model and the tokenizer.")],
    minutes: Annotated[float, typer.Option(min=0.01, help="Training time; loading and evaluation come on top.")] = 28.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Train this many steps instead of for a time.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first weights and of the windows.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    text: Annotated[Path | None, typer.Option(help="Folder of .py files; the standard library if not given.")] = None,
    held_out_tokens: Annotated[int, typer.Option(min=2, help="Evaluate on at most this many tokens.")] = 100_000,
) -> None:
    """Train the demo model and print its loss on files it has not seen."""
    console = Console()
    disable_progress_bar()  # Of loading and saving, which take no time here.
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    training, held_out = split_held_out(read_sources(text or Path(sysconfig.get_paths()["stdlib"])))
    with console.status("training the tokenizer"):
        tokenizer = train_tokenizer(training)
        ids = encode(tokenizer, training)
    console.print(f"{len(training)} files, {sum(map(len, training)):,} characters, {len(ids):,} tokens to train on")

    model = new_model(tokenizer)
    checkpoint = out.with_name(out.name + ".checkpoint.pt")
    out.mkdir(parents=True, exist_ok=True)
    state = train(model, ids, minutes, steps, seed, checkpoint)

    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    loss, counted = held_out_loss(out, encode(tokenizer, held_out), held_out_tokens)
    checkpoint.unlink()
    console.print(f"{state.step:,} steps, {state.tokens:,} tokens in {state.seconds / 60:.1f} minutes")
    console.print(f"{sum(path.stat().st_size for path in out.iterdir()):,} bytes in {out}")
    console.print(f"held out: {loss:.4f} nats per token over {counted:,} tokens of {len(held_out)} files")


if __name__ == "__main__":
    typer.run(main)
