"""`hf-accel convert-gqa`: a model with fewer key and value heads, saved as an ordinary checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from hf_accel.api import plan
from hf_accel.cli.models import (
    AsJson,
    Dtype,
    DtypeName,
    ModelName,
    Threads,
    check_folder,
    load_model,
    load_tokenizer,
    read_calibration,
    use_threads,
)
from hf_accel.cli.output import progress, results, write_json
from hf_accel.core.failures import converting
from hf_accel.errors import CheckpointError, ConfigError, UnsupportedModelError
from hf_accel.gqa import GQAConfig
from hf_accel.gqa import convert_gqa as convert
from hf_accel.gqa.architectures import in_architecture
from hf_accel.gqa.config import METHODS
from hf_accel.gqa.heads import attention_layers
from hf_accel.gqa.patcher import check_heads
from hf_accel.gqa.preview import cache_bytes
from hf_accel.gqa.text import texts_for
from hf_accel.measure import SHAPES
from hf_accel.measure.quality import Quality, QualityReference
from hf_accel.measure.text import FITTED_ROW_TOKENS, calibration_text

_Out = Annotated[
    Path | None,
    typer.Argument(metavar="OUT", help="The folder to write: a new one, or an empty one. Not needed for --preview."),
]
_Calibration = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="Text to convert with; about a fifth is kept back to measure on. Without it the model writes some.",
    ),
]


def convert_gqa(
    model: ModelName,
    out: _Out = None,
    *,
    kv_heads: Annotated[int, typer.Option(help="Key and value heads afterwards; they divide the query heads.")],
    method: Annotated[str, typer.Option(help=f"How heads are merged: {', '.join(METHODS)}.")] = "aligned",
    calibration: _Calibration = None,
    architecture: Annotated[
        str | None,
        typer.Option(help="Express the model in this architecture first, where its own cannot have fewer heads."),
    ] = None,
    repair_steps: Annotated[int, typer.Option(help="Gradient steps of the repair of each layer.")] = 200,
    preview: Annotated[
        bool, typer.Option("--preview", help="Show what each number of heads would cost, and write nothing.")
    ] = False,
    dtype: DtypeName = Dtype.bfloat16,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Give MODEL fewer key and value heads, write it to OUT, and report what that saves and costs."""
    config = GQAConfig(num_kv_heads=kv_heads, method=method, repair_steps=repair_steps)
    folder = None if preview else _checked(out)
    given = None if calibration is None else read_calibration(calibration)
    use_threads(threads)
    original: Any = load_model(model, dtype.torch)
    tokenizer = None if model in SHAPES else load_tokenizer(model)
    if calibration is not None and tokenizer is None:
        raise ConfigError(f"--calibration needs the tokenizer of {model!r}, which was not found.")
    if architecture is not None:
        with progress(f"expressing {model} as {architecture}"):
            original = in_architecture(original, architecture)
    check_heads(original, kv_heads)
    if folder is None:
        _show_preview(original, config, given, tokenizer, as_json)
        return
    with progress("writing text to measure on" if given is None else "reading the text"):
        text = None if given is None else calibration_text(original, given, tokenizer, row_tokens=FITTED_ROW_TOKENS)
        fitted, measured = texts_for(original, config, text)
    with progress("measuring the original"), _measuring(model):
        reference = QualityReference(original, measured)
    layers = attention_layers(original)
    parts = 1 if method != "aligned" else 3 if repair_steps else 1
    started = time.perf_counter()
    with progress(f"converting {len(layers)} layers", len(layers) * parts) as step:
        new = convert(
            original,
            kv_heads,
            method=method,
            calibration=None if fitted is None else fitted.ids,
            repair_steps=repair_steps,
            progress=step,
        )
    seconds = time.perf_counter() - started
    with progress("measuring the result"), _measuring(model):
        done = _Done(layers[0].kv_heads, kv_heads, cache_bytes(original), cache_bytes(new), reference.of(new), seconds)
    _write(new, tokenizer, folder)
    if as_json:
        write_json(done.to_dict() | {"method": method, "folder": str(folder)})
        return
    results.print(done.table(f"{type(new).__name__}, {dtype.value}, method {method}"))
    results.print(
        f"measured on {done.quality.tokens} tokens of {done.quality.source}\n"
        f"written to {folder}; it loads as any model of transformers does",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@dataclass(frozen=True)
class _Done:
    """What a conversion saved and cost; bytes are those that the cache keeps for a token."""

    kv_heads_before: int
    kv_heads: int
    cache_bytes_before: int
    cache_bytes: int
    quality: Quality
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"quality": self.quality.to_dict()}

    def table(self, title: str) -> Table:
        quality = self.quality
        table = Table(title=title, title_justify="left")
        for name in ("", "before", "after"):
            table.add_column(name, justify="left" if not name else "right")
        table.add_row("key/value heads", str(self.kv_heads_before), str(self.kv_heads))
        table.add_row("cache, bytes per token", f"{self.cache_bytes_before:,}", f"{self.cache_bytes:,}")
        table.add_row("KL, nats per token", "", f"{quality.kl:.3g}")
        table.add_row("likeliest token equal", "", f"{100 * quality.top1_agreement:.1f} %")
        if quality.perplexity_before is not None and quality.perplexity_after is not None:
            table.add_row("perplexity", f"{quality.perplexity_before:.2f}", f"{quality.perplexity_after:.2f}")
        table.add_row("conversion, seconds", "", f"{self.seconds:.1f}")
        return table


def _show_preview(model: Any, config: GQAConfig, given: str | None, tokenizer: Any, as_json: bool) -> None:
    with progress("trying every number of heads"):
        chosen = plan(model, config, calibration=given, tokenizer=tokenizer)
    if as_json:
        write_json(chosen.to_dict())
        return
    for each in chosen.previews:
        results.print(str(each), markup=False, highlight=False, soft_wrap=True)


def _checked(out: Path | None) -> Path:
    """Find out before anything is loaded whether there is a folder to write, and nothing in it that would be lost.

    Raises:
        ConfigError: there is none, or it is not empty.
    """
    if out is None:
        raise ConfigError("OUT is missing. Name the folder to write, or give --preview.")
    check_folder(out)
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"OUT is not empty: {out}. Name another folder.")
    return out


def _measuring(name: str) -> Any:
    return converting(UnsupportedModelError, f"The quality of {name!r} cannot be measured")


def _write(model: Any, tokenizer: Any, out: Path) -> None:
    with progress(f"writing {out}"), converting(CheckpointError, f"The result could not be written to {out}"):
        model.save_pretrained(out)
        if tokenizer is not None:
            tokenizer.save_pretrained(out)
