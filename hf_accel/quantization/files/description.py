"""Finds what describes a folder's packed weights: `config.json`, or a file beside it, and opens it by its method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_accel.errors import CheckpointError, described
from hf_accel.quantization.files.checkpoint import read_json
from hf_accel.quantization.files.foreign import (
    AUTOROUND,
    AWQ,
    GPTQ,
    AutoRoundDescription,
    AwqDescription,
    GptqDescription,
    normalised,
)
from hf_accel.quantization.files.formats import METHOD, PRIVATE_METHOD
from hf_accel.quantization.files.layout import Description
from hf_accel.quantization.files.mxfp4 import MXFP4, Mxfp4Description
from hf_accel.quantization.files.rules import Rules

CONFIG, GPTQ_FILE = "config.json", "quantize_config.json"
BESIDE = {GPTQ_FILE: GPTQ, "quant_config.json": AWQ}  # file of a method -> the method, unless the file names it
_DECISIVE = ("bits", "group_size", "sym", "desc_act", "checkpoint_format")
_OPENERS: dict[str, Callable[[Mapping[str, Any], str], Description]] = {
    METHOD: Rules, PRIVATE_METHOD: Rules, GPTQ: GptqDescription, AWQ: AwqDescription,
    AUTOROUND: AutoRoundDescription, "intel/auto-round": AutoRoundDescription, MXFP4: Mxfp4Description,
}  # fmt: skip


def find_description(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the description of a folder's packed weights, None where there is none.

    GPTQ's own file beside `config.json` adds what that leaves out; where both say something, it must be the same.

    Raises:
        CheckpointError: one of the files is damaged, or they contradict each other.
    """
    inner = config.get("quantization_config")
    if inner is not None and not isinstance(inner, dict):
        raise CheckpointError(f"{folder / CONFIG} is damaged: its quantization_config is not a JSON object.")
    for file, method in BESIDE.items():
        path = folder / file
        if not path.exists():
            continue
        if inner is None:
            found = read_json(path)
            return {"quant_method": method} | found
        if inner.get("quant_method") == method == GPTQ:
            return _joined(inner, read_json(path), folder)
    return inner


def _joined(inner: dict[str, Any], beside: dict[str, Any], folder: Path) -> dict[str, Any]:
    inner, beside = normalised(inner), normalised(beside)
    for name in _DECISIVE:
        one, two = inner.get(name), beside.get(name)
        if one is not None and two is not None and one != two:
            raise CheckpointError(
                f"{folder / CONFIG} says {name}={one!r} and {folder / GPTQ_FILE} says {name}={two!r}. Delete or "
                "correct the one that is wrong."
            )
    return beside | {name: value for name, value in inner.items() if value is not None}


def opened(description: Mapping[str, Any], where: str) -> Description:
    """Return the reader of a description; `where` is the file it stands in.

    Raises:
        CheckpointError: its method, or what it describes, is not served; or it is damaged.
    """
    method = description.get("quant_method")
    opener = _OPENERS.get(method) if isinstance(method, str) else None
    if opener is None:
        raise CheckpointError(
            f"{where} describes the quantization method {method!r}. hf_accel reads {METHOD}, {GPTQ}, {AWQ}, "
            f"{AUTOROUND} and {MXFP4}; load the folder with AutoModelForCausalLM and the package of its own format."
        )
    try:
        return opener(description, where)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{where} is damaged: its quantization_config holds values of a wrong kind ({described(error)})."
        ) from error
