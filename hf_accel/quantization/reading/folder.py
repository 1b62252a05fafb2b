"""Models in a folder, or on the hub, as safetensors: read in few bits, or as they are stored."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig

from hf_accel.core.calls.report import Applied, Skip
from hf_accel.core.failures import converting
from hf_accel.core.steps.patcher import Fidelity
from hf_accel.errors import CheckpointError, ConfigError, HfAccelError, UnsupportedModelError
from hf_accel.quantization.config import WeightOnlyConfig
from hf_accel.quantization.files.checkpoint import Checkpoint, read_json
from hf_accel.quantization.files.description import CONFIG, find_description
from hf_accel.quantization.files.loading import FETCHED, from_pretrained, generation_config, stem_of
from hf_accel.quantization.files.rebuilding import model_class
from hf_accel.quantization.reading.budget import chosen_bits
from hf_accel.quantization.reading.kept import Kept
from hf_accel.quantization.reading.quantizer import Reading
from hf_accel.quantization.reading.sources import Loaded, Request
from hf_accel.quantization.reading.stream import Stored, stored_tensors


class Folder:
    """A saved model: a local folder, or a name on the hub, whose files are fetched into its cache."""

    def claims(self, name: str) -> bool:
        return True

    def read(self, request: Request) -> Loaded:
        """Return the model; see `Source.read`."""
        if request.config is None and request.memory_budget_bytes is None:
            if request.cache:
                raise ConfigError("cache=True keeps packed weights; name a WeightOnlyConfig, or memory_budget_bytes.")
            if not request.large_pages:
                return Loaded(from_pretrained(request.name, request.dtype))
        with converting(CheckpointError, f"{request.name} cannot be loaded"):
            return _Saved(request).read()


class _Saved:
    """The files of one model, and how they are read."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.place = Path(request.name)
        self.home = Path(f"{os.path.abspath(request.name)}.hf_accel")
        if not self.place.is_dir():
            self.place = Path(snapshot_download(request.name, **FETCHED))
            hub = self.place.parents[2]  # <hub>/models--owner--name/snapshots/<revision>
            self.home = hub.with_name("hf_accel") / self.place.parents[1].name
        self.is_packed = find_description(self.place, read_json(self.place / CONFIG)) is not None
        if self.is_packed and (request.config is not None or request.memory_budget_bytes is not None):
            raise UnsupportedModelError(
                f"{request.name} holds weights that are packed already; they are not rounded once more. Load it "
                "without a config of weights and without a budget."
            )
        self.config = AutoConfig.from_pretrained(self.place)
        self.config.dtype = request.dtype or getattr(self.config, "dtype", None) or self._stored_dtype()

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        return stored_tensors(Checkpoint(self.place, stem_of(self.place)))

    def _stored_dtype(self) -> torch.dtype:
        return next((tensor.dtype for tensor in self.tensors.values() if tensor.is_floating_point()), torch.float32)

    def read(self) -> Loaded:
        """Return the model: mapped where its pack is kept, read in few bits, or as it is where that fits the budget."""
        request, rounding = self.request, self.request.config
        if self.is_packed:  # packing lays its tensors out anew in memory
            return Loaded(from_pretrained(request.name, request.dtype))
        if request.memory_budget_bytes is not None:
            rounding = chosen_bits(self.config, request.memory_budget_bytes)
        if rounding is None:
            if not request.large_pages:
                return Loaded(from_pretrained(self.place, self.config.dtype))
            return Loaded(self._named(self._made()))
        kept = Kept(self.place, self.home, rounding, self.config.dtype) if request.cache else None
        found = None if kept is None else kept.open(self.config, large_pages=request.large_pages)
        if found is None:
            found = self._in_few_bits(rounding)
            if kept is not None:
                kept.keep(*found)
        model, told = found
        entry = Applied(rounding, told["summary"], 0, Fidelity.LOSSY.value)
        skipped = tuple(Skip(type(rounding).__name__, reason) for reason in told["skipped"])
        return Loaded(self._named(model), (entry,), skipped, told["weight_bytes"])

    def _named(self, model: Any) -> Any:
        model.config.name_or_path = model.name_or_path = self.request.name
        if model.can_generate() and (self.place / "generation_config.json").exists():
            model.generation_config = generation_config(self.place)
        return model

    def _in_few_bits(self, rounding: WeightOnlyConfig) -> tuple[Any, dict[str, Any]]:
        """Return the model in few bits, every tensor read once, and what was done to it."""
        reading = Reading(rounding, self.request.advance)
        model = self._made(reading)
        if reading.change is None:
            raise CheckpointError(
                f"transformers has loaded {self.place} without our quantizer; this is a fault of ours."
            )
        told = {
            "summary": reading.change.summary,
            "skipped": list(reading.change.skipped),
            "weight_bytes": sum(tensor.nbytes for tensor in self.tensors.values()),
        }
        return model, told

    def _made(self, reading: Reading | None = None) -> Any:
        """Return the model, every tensor read once into memory of its own; without `reading` as it is stored."""
        cls: Any = model_class(self.config)
        try:
            model, info = cls.from_pretrained(
                None, config=self.config, state_dict=self.tensors, dtype=self.config.dtype,
                quantization_config=reading, ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
        except HfAccelError:
            raise
        except Exception:
            if reading is not None and reading.error is not None:
                raise reading.error from None
            raise
        _check_complete(self.place, cls, info)
        return model.eval()


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
