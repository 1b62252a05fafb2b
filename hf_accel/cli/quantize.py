"""`hf-accel quantize`: a model's weights in few bits, saved in a format that other tools read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_accel.api import optimize, report
from hf_accel.cli.methods import METHODS, Asked, chosen_config
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
from hf_accel.core.config import Config
from hf_accel.core.failures import converting
from hf_accel.core.steps.patcher import Patcher
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import CheckpointError, ConfigError, UnsupportedModelError
from hf_accel.measure import SHAPES
from hf_accel.measure.quality import CalibrationText, QualityReference
from hf_accel.measure.text import FITTED_ROW_TOKENS, ROW_TOKENS, calibration_text
from hf_accel.quantization.files.saving import QUANTIZED
from hf_accel.quantization.files.seal import save_pretrained

MINUTES = 15.0  # of training
_FORMATS = ", ".join(name for name in QUANTIZED if name)


def quantize(
    model: ModelName,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it is made if it is not there.")],
    method: Annotated[
        str,
        typer.Option(help="How weights are chosen: " + "; ".join(f"{name}: {m.help}" for name, m in METHODS.items())),
    ] = "nearest",
    bits: Annotated[float, typer.Option(help="Bits per weight: 8, 4, 3 or 2.")] = 4,
    group_size: Annotated[int | None, typer.Option(help="Columns that share a scale: 32, 64 or 128.")] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="A zero of its own for each group.")] = False,
    head: Annotated[int, typer.Option(help="Bits of the output head: 8, 4, or 0 to leave it as it is.")] = 8,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="PATTERN=BITS for the products whose names match; 0 bits leave them. May be repeated."),
    ] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Store the embeddings in 8 bits, too.")] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Text to choose weights on, of which a fifth is kept back to measure the cost on; all of it is "
            "measured on where none is fitted to. Without it the model writes some.",
        ),
    ] = None,
    refine_steps: Annotated[int, typer.Option(help="Gradient steps on each layer, behind choosing.")] = 0,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Keep finished layers in OUT.partial and go on there, if a run was interrupted."),
    ] = False,
    format: Annotated[
        str | None,
        typer.Option(help=f"Format of the files: {_FORMATS}.", show_default="compressed-tensors where it fits"),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="What training may take, writing text included.", show_default=f"{MINUTES:g}")
    ] = None,
    dtype: DtypeName = Dtype.bfloat16,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Quantize the weights of MODEL, write it to OUT, and report bytes and what it cost in quality."""
    shared = {
        "group_size": group_size,
        "symmetric": not asymmetric,
        "layers": tuple(_pair(text) for text in layer or ()),
        "head": head or None,
        "embeddings": 8 if embeddings else None,
    }
    partial = Path(f"{out.absolute()}.partial") if resume else None
    config: Any = chosen_config(method, Asked(bits, shared, refine_steps, partial, minutes))
    if format not in QUANTIZED:
        raise ConfigError(f"--format is one of {_FORMATS}; {format!r} was given.")
    check_folder(out)
    given = None if calibration is None else read_calibration(calibration)
    use_threads(threads)
    loaded: Any = load_model(model, dtype.torch)
    tokenizer = None if model in SHAPES else load_tokenizer(model)
    if calibration is not None and tokenizer is None:
        raise ConfigError(f"--calibration needs the tokenizer of {model!r}, which was not found.")
    split = None
    if METHODS[method].trains:
        from hf_accel.recipes import qat  # with transformers.Trainer: seconds

        qat(loaded, config, given, tokenizer=tokenizer, minutes=minutes or MINUTES, out=partial)
    else:
        split = _optimized(loaded, model, config, given, tokenizer)
    with progress(f"writing {out}"):
        refused = _save(loaded, out, format)
        if tokenizer is not None:
            with converting(CheckpointError, f"The tokenizer could not be written to {out}"):
                tokenizer.save_pretrained(out)
    if partial is not None:
        shutil.rmtree(partial, ignore_errors=True)
    if refused is not None:
        raise UnsupportedModelError(
            f"--format {format}: {refused} Nothing is lost: {out} has the model as it is written without --format."
        ) from refused
    if as_json:
        write_json(report(loaded).to_dict() | {"method": method, "split": split, "folder": str(out)})
        return
    lines = [str(report(loaded))]
    if split is not None:
        lines.append(
            f"of the text {split['fitted']:,} tokens chose the weights, and {split['measured']:,} were kept back to "
            "measure on"
        )
    for line in [
        *lines,
        f"written to {out}; load it with hf_accel.from_pretrained, and hf_accel.optimize adds the exact steps",
    ]:
        results.print(line, markup=False, highlight=False, soft_wrap=True)


def _save(model: Any, out: Path, format: str | None) -> UnsupportedModelError | None:
    """Write the model; in a format that cannot hold it, as without one, returning why."""
    try:
        save_pretrained(model, out, format=format)
    except UnsupportedModelError as error:
        if format is None:
            raise
        save_pretrained(model, out)
        return error
    return None


def _optimized(model: Any, name: str, config: Config, given: str | None, tokenizer: Any) -> dict[str, int] | None:
    """Quantize `model` in place, giving its originals up, and measure; return how many tokens were used for what.

    What is chosen on text that the model writes is measured on other text that it writes.
    """
    patcher = Patcher.for_config(config)
    is_fitted, parts = patcher.is_fitted_to_text, patcher.parts(Setting.of(model))
    measuring = converting(UnsupportedModelError, f"The quality of {name!r} cannot be measured")
    text: CalibrationText | None = None
    reference = split = None
    with progress("measuring the original" if given is None else "reading the text"), measuring:
        if given is None:
            reference = QualityReference(model, calibration_text(model))
        else:
            row_tokens = FITTED_ROW_TOKENS if is_fitted else ROW_TOKENS
            text = calibration_text(model, given, tokenizer, row_tokens=row_tokens)
    if text is not None and is_fitted:
        split = dict(zip(("fitted", "measured"), (part.ids.numel() for part in text.split()), strict=True))
    with progress(f"quantizing {name}", parts) as step:
        optimize(model, [config], calibration=text, originals="drop", progress=step)
    if reference is not None:
        with progress("measuring the result"):
            report(model).quality = reference.compare()
    return split


def _pair(text: str) -> tuple[str, int | None]:
    pattern, _, bits = text.rpartition("=")
    if not pattern or not bits.isdigit():
        raise ConfigError(f"--layer takes PATTERN=BITS, for example 'model.layers.0.*=8'; {text!r} was given.")
    return pattern, int(bits) or None
