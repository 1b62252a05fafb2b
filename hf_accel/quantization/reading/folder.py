"""Models in a folder, or on the hub, as safetensors: read in few bits, or as they are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig

from hf_accel.core.calls.report import Applied, Skip
from hf_accel.core.failures import converting
from hf_accel.core.steps.patcher import Fidelity
from hf_accel.errors import CheckpointError, HfAccelError, UnsupportedModelError
from hf_accel.quantization.config import WeightOnlyConfig
from hf_accel.quantization.files.checkpoint import Checkpoint, read_json
from hf_accel.quantization.files.description import CONFIG, find_description
from hf_accel.quantization.files.loading import from_pretrained, generation_config, stem_of
from hf_accel.quantization.files.rebuilding import model_class
from hf_accel.quantization.reading.budget import chosen_bits
from hf_accel.quantization.reading.quantizer import Reading
from hf_accel.quantization.reading.sources import Loaded, Request
from hf_accel.quantization.reading.stream import Stored, stored_tensors

_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt"]


class Folder:
    """A saved model: a local folder, or a name on the hub, whose files are fetched into its cache."""

    def claims(self, name: str) -> bool:
        return True

    def read(self, request: Request) -> Loaded:
        """Return the model; see `Source.read`."""
        if request.config is None and request.memory_budget_bytes is None:
            return Loaded(from_pretrained(request.name, request.dtype))
        with converting(CheckpointError, f"{request.name} cannot be loaded"):
            place = _place(request.name)
            if find_description(place, read_json(place / CONFIG)) is not None:
                raise UnsupportedModelError(
                    f"{request.name} holds weights that are packed already; they are not rounded once more. Load it "
                    "without a config of weights and without a budget."
                )
            tensors = stored_tensors(Checkpoint(place, stem_of(place)))
            config = _config(place, tensors, request.dtype)
            rounding = request.config
            if request.memory_budget_bytes is not None:
                rounding = chosen_bits(config, request.memory_budget_bytes)
            if rounding is None:
                return Loaded(from_pretrained(place, config.dtype))
            return _in_few_bits(request, place, config, tensors, rounding)


def _place(name: str) -> Path:
    path = Path(name)
    return path if path.is_dir() else Path(snapshot_download(name, allow_patterns=_PATTERNS))


def _config(place: Path, tensors: dict[str, Stored], dtype: torch.dtype | None) -> Any:
    """Return the transformers config of a folder, with the dtype of what will not be packed."""
    config = AutoConfig.from_pretrained(place)
    stored = getattr(config, "dtype", None)
    floats = (tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    config.dtype = dtype or stored or next(floats, torch.float32)
    return config


def _in_few_bits(
    request: Request, place: Path, config: Any, tensors: dict[str, Stored], rounding: WeightOnlyConfig
) -> Loaded:
    """Return the model, every tensor read once."""
    reading = Reading(rounding, request.advance)
    cls: Any = model_class(config)
    try:
        model, told = cls.from_pretrained(
            None, config=config, state_dict=tensors, dtype=config.dtype, quantization_config=reading,
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    except HfAccelError:
        raise
    except Exception:
        if reading.error is not None:
            raise reading.error from None
        raise
    _check_complete(place, cls, told)
    model.config.name_or_path = model.name_or_path = request.name
    if model.can_generate() and (place / "generation_config.json").exists():
        model.generation_config = generation_config(place)
    change = reading.change
    if change is None:
        raise CheckpointError(f"transformers has loaded {request.name} without a quantizer; report this as a fault.")
    entry = Applied(rounding, change.summary, change.extra_bytes, Fidelity.LOSSY.value)
    skipped = tuple(Skip(type(rounding).__name__, reason) for reason in change.skipped)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    return Loaded(model.eval(), (entry,), skipped, nbytes)


def _check_complete(place: Path, cls: type, told: dict[str, Any]) -> None:
    """Check that every tensor of the model was in the files in its shape, and nothing else was.

    Raises:
        CheckpointError: transformers filled something in, or left something out.
    """
    if mismatched := sorted(told["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        raise CheckpointError(
            f"{place}, tensor {name}: its shape is {tuple(found)}; the model's config asks for {tuple(wanted)}. "
            "Save or download the checkpoint anew."
        )
    if missing := sorted(told["missing_keys"]):
        raise CheckpointError(
            f"{place} lacks the tensor {missing[0]} of a {cls.__name__}; the checkpoint is not complete. Save or "
            "download it anew."
        )
    if unexpected := sorted(told["unexpected_keys"]):
        raise CheckpointError(
            f"{place} holds the tensor {unexpected[0]}, which a {cls.__name__} of its config does not have. Is "
            f"{CONFIG} the one that was saved with it?"
        )
