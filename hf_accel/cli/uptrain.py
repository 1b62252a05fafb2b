"""`hf-accel uptrain`: a changed model healed by distillation from its original, and saved as an ordinary one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_accel.cli.models import AsJson, Dtype, Threads, check_folder, load_model, load_tokenizer, use_threads
from hf_accel.cli.output import progress, results, write_json
from hf_accel.core.failures import converting
from hf_accel.errors import CheckpointError, ConfigError

MINUTES = 10.0
TRAINING, CONFIG = "training", "config.json"  # below OUT: what the run needs and shows; the file that makes OUT a model

_Texts = Annotated[
    list[Path] | None,
    typer.Option(
        exists=True,
        help="A text file, or a folder whose UTF-8 files are read. May be repeated.",
        show_default="the teacher writes it",
    ),
]


def uptrain(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="The changed model: a local folder or a hub id.")],
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="The original: a local folder or a hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it is made if it is not there.")],
    text: _Texts = None,
    held_out: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True, help="Files or folders to measure on.", show_default="every fiftieth window of the text"
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Wall time of the training with all measurements.", show_default=f"{MINUTES:g}")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Train on this many tokens instead of for a time.")] = None,
    steps: Annotated[int | None, typer.Option(help="Train this many steps instead of for a time.")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Train LoRA of this rank, merged at the end.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Its peak.", show_default="by the model's size")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens per window of text.", show_default="512")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows per step.", show_default="1024 tokens in all")] = None,
    hidden_weight: Annotated[
        float | None, typer.Option(help="Weight of the hidden-state loss.", show_default="4 where it can be computed")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of windows, dropout, LoRA and written text.")] = 0,
    dtype: Annotated[
        Dtype, typer.Option(help="Data type to load the models in and to save the result in; fp32 is trained.")
    ] = Dtype.float32,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Train STUDENT towards TEACHER, write it to OUT, and report what it gained.

    The same command again continues a run that was interrupted.
    """
    _check_out(out)
    use_threads(threads)
    model, original = load_model(student, dtype.torch), load_model(teacher, dtype.torch)
    tokenizer = next((found for name in (teacher, student) if (found := load_tokenizer(name)) is not None), None)
    if tokenizer is None and (text or held_out):
        raise ConfigError(f"--text needs a tokenizer, and none was found beside {teacher!r} or {student!r}.")

    from hf_accel.recipes import uptrain as run

    result = run(
        model,
        original,
        _read(text),
        tokenizer=tokenizer,
        held_out=_read(held_out),
        out=out / TRAINING,
        minutes=MINUTES if minutes is tokens is steps is None else minutes,
        tokens=tokens,
        steps=steps,
        lora_rank=lora_rank,
        learning_rate=learning_rate,
        window=window,
        batch_size=batch_size,
        hidden_weight=hidden_weight,
        seed=seed,
    )
    with progress(f"writing {out}"), converting(CheckpointError, f"The result could not be written to {out}"):
        _write(model, tokenizer, out)
    if as_json:
        write_json(result.to_dict() | {"folder": str(out)})
        return
    shown = f"{result}\nwritten to {out}; the learning curve to {out / TRAINING}"
    results.print(shown, markup=False, highlight=False, soft_wrap=True)


def _check_out(out: Path) -> None:
    """Find out before anything is loaded whether OUT can be written, and has no model that would be lost.

    Raises:
        ConfigError: it cannot, or it has one.
    """
    check_folder(out)
    if (out / CONFIG).exists():
        raise ConfigError(f"OUT has a model already ({out / CONFIG}). Name another folder.")
    if out.is_dir() and not (out / TRAINING).is_dir() and any(out.iterdir()):
        raise ConfigError(f"OUT is neither empty nor of an interrupted run: {out}. Name another folder.")


def _read(paths: list[Path] | None) -> list[str] | None:
    """Return the texts of files, and of the UTF-8 files below folders in the order of their names; None for none.

    Raises:
        ConfigError: a file that was named is not in UTF-8, or there is no text in all of them.
    """
    if not paths:
        return None
    found = []
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if not file.is_file():
                continue
            try:
                found.append(file.read_text(encoding="utf-8"))
            except (UnicodeDecodeError, OSError) as error:
                if file is path:
                    raise ConfigError(f"--text takes texts in UTF-8; {str(path)!r} is not one ({error}).") from error
    if not any(found):
        raise ConfigError(f"There is no text in {', '.join(map(str, paths))}.")
    return found


def _write(model: Any, tokenizer: Any, out: Path) -> None:
    """Save aside and move, the config last: OUT is a model, or the run can be taken up. Then drop the checkpoints."""
    aside = out / TRAINING / "model"
    model.save_pretrained(aside)
    if tokenizer is not None:
        tokenizer.save_pretrained(aside)
    for file in sorted(aside.iterdir(), key=lambda file: file.name == CONFIG):
        file.replace(out / file.name)
    aside.rmdir()
    for checkpoint in (out / TRAINING).glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
