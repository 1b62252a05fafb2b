"""`hf-accel export`: a model as a GGUF file, which llama.cpp opens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from hf_accel.cli.models import AsJson, Dtype, load_tokenizer
from hf_accel.cli.output import progress, results, write_json
from hf_accel.errors import ConfigError
from hf_accel.loading import load
from hf_accel.quantization.config import WeightOnlyConfig
from hf_accel.quantization.gguf.saving import export_gguf

_SUFFIX = ".gguf"
_GROUP = 32  # of Q4_0


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A folder (as hf-accel quantize writes it, or any other), a hub id, or a GGUF file."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write, which ends in .gguf.")],
    bits: Annotated[
        int | None,
        typer.Option(help="Round weights that are not packed: 4 (Q4_0) or 8 (Q8_0).", show_default="as they are"),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Data type of what is not packed.", show_default="as stored")
    ] = None,
    without_tokenizer: Annotated[
        bool, typer.Option("--without-tokenizer", help="Write no tokenizer; programs must then be given ids.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write MODEL to the GGUF file OUT: packed weights bit by bit, everything else as it is."""
    if out.suffix != _SUFFIX:
        raise ConfigError(f"OUT is a file that ends in {_SUFFIX}; {str(out)!r} was given.")
    if bits not in (None, 4, 8):
        raise ConfigError(f"--bits is 4 or 8; {bits!r} was given.")
    transformers_logging.disable_progress_bar()
    tokenizer = None if without_tokenizer else _tokenizer(model)
    configs = [] if bits is None else [WeightOnlyConfig(bits=bits, group_size=_GROUP)]
    with progress(f"loading {model}") as step:
        loaded: Any = load(model, configs, dtype=None if dtype is None else dtype.torch, progress=step)
    with progress(f"writing {out}") as step:
        report = export_gguf(loaded, out, tokenizer, advance=step)
    if as_json:
        write_json(report.to_dict())
    else:
        results.print(str(report), markup=False, highlight=False, soft_wrap=True)


def _tokenizer(model: str) -> Any:
    if model.endswith(_SUFFIX):
        path = Path(model)
        found = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    else:
        found = load_tokenizer(model)
    if found is None:
        raise ConfigError(
            f"No tokenizer was found beside {model!r}. To write the model alone, add --without-tokenizer."
        )
    return found
