"""Whether a calibrated model still reads text of the kind that it was calibrated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_accel.core.calls.hosting import host_of
from hf_accel.core.model.modes import evaluating
from hf_accel.core.model.shadow import twin
from hf_accel.core.model.support import unwrap
from hf_accel.errors import ConfigError, ConflictError, UnsupportedModelError
from hf_accel.measure.text import calibration_text
from hf_accel.quantization.calibrating.powers import distance, distances_within
from hf_accel.quantization.gptq import SECTION

OTHER = 2.0
"""From this many times the usual distance on, a text is of another kind. Parts of held-out text of the kind that a code
model was calibrated on lay at 1.1 times, prose in Markdown at 3.9, stories at more (docs/results.md)."""


@dataclass(frozen=True)
class InputDrift:
    """What the product at `path` reads: how far from calibration, in nats per channel, and how far parts of the
    calibration text are from each other (`usual`)."""

    path: str
    distance: float
    usual: float


@dataclass(frozen=True)
class CalibrationDrift:
    """How far what a model reads is from what it was calibrated on; `inputs` in the order of the model."""

    inputs: tuple[InputDrift, ...]
    tokens: int

    @property
    def ratio(self) -> float:
        """The mean distance over the usual one: about 1 for text of the same kind."""
        usual = sum(one.usual for one in self.inputs)
        return sum(one.distance for one in self.inputs) / max(usual, torch.finfo(torch.float32).tiny)

    @property
    def is_other(self) -> bool:
        """Whether the text is of another kind."""
        return self.ratio > OTHER

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "ratio": self.ratio,
            "is_other": self.is_other,
            "tokens": self.tokens,
            "inputs": [asdict(one) for one in self.inputs],
        }

    def __str__(self) -> str:
        worst = max(self.inputs, key=lambda one: one.distance / max(one.usual, 1e-12))
        verdict = "text of another kind: calibrate on text like this" if self.is_other else "text of the same kind"
        return (
            f"{verdict}; on {self.tokens:,} tokens inputs are {self.ratio:.2f} times as far from calibration as parts "
            f"of the calibration text are from each other ({OTHER:g} or more: another kind), most in {worst.path}: "
            f"{worst.distance:.3g} nats per channel against {worst.usual:.3g}"
        )


@torch.no_grad()
def calibration_drift(model: Any, text: Any, tokenizer: Any = None) -> CalibrationDrift:
    """Return how far the inputs of a calibrated model's products are, on `text`, from those on its calibration text.

    Of every input the mean square of each channel is compared, as the symmetric Kullback-Leibler divergence of normal
    distributions with these variances, in parts as long as those of the calibration text, and held against what those
    differ by. Cost: a forward pass over the text, and 8 K numbers in fp32 kept for every input of K channels.

    Args:
        model: optimised with a `GPTQConfig` in this process; loaded from files it does not know its calibration text.
        text: as `calibration` of `optimize`; an eighth of the length of the calibration text is the least.
        tokenizer: for text given as texts.

    Raises:
        ConflictError: the model is not optimised.
        UnsupportedModelError: it was not calibrated here, or on one row only, whose parts are not known.
        ConfigError: the text is none, or too short.
    """
    unwrapped: Any = unwrap(model)
    host = host_of(unwrapped) if isinstance(unwrapped, nn.Module) else None
    if host is None:
        raise ConflictError(f"This {type(unwrapped).__name__} is not optimised. Call hf_accel.optimize(model) first.")
    section: Any = host.report.sections.get(SECTION)
    known: dict[str, Tensor] = {} if section is None else section.powers
    if not known:
        raise UnsupportedModelError(
            f"It is not known what this {type(unwrapped).__name__} was calibrated on: that takes a GPTQConfig in this "
            "process and a text of two rows or more."
        )
    rows, length = section.part_rows, section.row_tokens
    ids = calibration_text(unwrapped, text, tokenizer, row_tokens=length).ids.flatten()
    parts = len(ids) // (rows * length)
    if not parts:
        raise ConfigError(
            f"text has {len(ids)} tokens; {rows * length} or more are compared with parts of the calibration text, "
            "which have as many."
        )
    found = _read(twin(unwrapped), ids[: parts * rows * length].view(parts, rows, length), known)
    inputs = []
    for path, reference in known.items():
        if path not in found:
            continue  # experts that this text does not reach in every part
        usual, mean = distances_within(reference), reference.double().mean(dim=0)
        distances = [distance(mean, part) for part in found[path]]
        inputs.append(InputDrift(path, sum(distances) / len(distances), sum(usual) / len(usual)))
    if not inputs:
        raise UnsupportedModelError("No calibrated product of this model read anything of the text.")
    return CalibrationDrift(tuple(inputs), parts * rows * length)


def _read(model: Any, ids: Tensor, paths: Sequence[str] | dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Return path -> mean squares [K] of what products read in each part of ids [parts, rows, T]."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = (args[0] if args else next(iter(kwargs.values()))).detach().flatten(0, -2).float()
        sums[path] = sums.get(path, 0) + rows.square().sum(dim=0).double()
        counts[path] = counts.get(path, 0) + len(rows)

    found: dict[str, list[Tensor]] = {}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(partial(add, path), with_kwargs=True) for path in paths
    ]
    try:
        with evaluating(model):
            for part in ids.to(model.device):
                sums.clear()
                counts.clear()
                for row in part:
                    model(row[None], use_cache=False)
                for path, total in sums.items():
                    if counts[path]:
                        found.setdefault(path, []).append(total / counts[path])
    finally:
        for hook in hooks:
            hook.remove()
    return {path: parts for path, parts in found.items() if len(parts) == len(ids)}
