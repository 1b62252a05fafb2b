"""`hf-accel quantize`: a model's weights in 8 or 4 bits, saved in a format that other tools read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
from hf_accel.core.steps.applying import apply
from hf_accel.core.steps.plan import Plan
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import CheckpointError, ConfigError, UnsupportedModelError
from hf_accel.measure import SHAPES
from hf_accel.measure.quality import QualityReference
from hf_accel.measure.text import calibration_text
from hf_accel.quantization import WeightOnlyConfig
from hf_accel.quantization.files.seal import save_pretrained
from hf_accel.quantization.targets import targets


def quantize(
    model: ModelName,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it is made if it is not there.")],
    bits: Annotated[int, typer.Option(help="Bits per weight: 8 or 4.")] = 4,
    group_size: Annotated[int | None, typer.Option(help="Columns that share a scale: 32, 64 or 128.")] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="A zero of its own for each group.")] = False,
    head: Annotated[int, typer.Option(help="Bits of the output head: 8, 4, or 0 to leave it as it is.")] = 8,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="PATTERN=BITS for the products whose names match; 0 bits leave them. May be repeated."),
    ] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Store the embeddings in 8 bits, too.")] = False,
    calibration: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Text to measure the cost on, with perplexity.")
    ] = None,
    dtype: DtypeName = Dtype.bfloat16,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Quantize the weights of MODEL, write it to OUT, and report bytes and what it cost in quality."""
    config = WeightOnlyConfig(
        bits=bits,
        group_size=group_size,
        symmetric=not asymmetric,
        layers=tuple(_pair(text) for text in layer or ()),
        head=head or None,
        embeddings=8 if embeddings else None,
    )
    check_folder(out)
    given = None if calibration is None else read_calibration(calibration)
    use_threads(threads)
    loaded = load_model(model, dtype.torch)
    tokenizer = None if model in SHAPES else load_tokenizer(model)
    if calibration is not None and tokenizer is None:
        raise ConfigError(f"--calibration needs the tokenizer of {model!r}, which was not found.")
    setting = Setting.of(loaded, originals="drop")
    measuring = converting(UnsupportedModelError, f"The quality of {model!r} cannot be measured")
    with progress("measuring the original"), measuring:
        text = calibration_text(loaded, given, tokenizer)
        reference = QualityReference(loaded, text)
    count = len(targets(setting.anatomy, config)[0])
    with progress(f"quantizing {count} products", count) as setting.progress:
        host = apply(Plan.of([config]), setting)
    with progress("measuring the result"):
        host.report.quality = reference.compare()
    with progress(f"writing {out}"):
        save_pretrained(loaded, out)
        if tokenizer is not None:
            with converting(CheckpointError, f"The tokenizer could not be written to {out}"):
                tokenizer.save_pretrained(out)
    if as_json:
        write_json(host.report.to_dict() | {"folder": str(out)})
        return
    results.print(str(host.report), markup=False, highlight=False, soft_wrap=True)
    results.print(
        f"written to {out}; load it with hf_accel.from_pretrained", markup=False, highlight=False, soft_wrap=True
    )


def _pair(text: str) -> tuple[str, int | None]:
    pattern, _, bits = text.rpartition("=")
    if not pattern or not bits.isdigit():
        raise ConfigError(f"--layer takes PATTERN=BITS, for example 'model.layers.0.*=8'; {text!r} was given.")
    return pattern, int(bits) or None
