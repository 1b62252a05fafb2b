"""The verb load: a model is read in few bits, one tensor at a time, and then optimised."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from hf_accel.api import Goal, optimize
from hf_accel.core.calls.hosting import host_of
from hf_accel.core.config import Config
from hf_accel.core.failures import converting
from hf_accel.core.steps.plan import Plan
from hf_accel.errors import ConfigError
from hf_accel.pages import LargePagesConfig
from hf_accel.quantization.config import WeightOnlyConfig
from hf_accel.quantization.files.loading import dtype_of
from hf_accel.quantization.reading.register import source_of
from hf_accel.quantization.reading.sources import Loaded, Request


def load(
    name: str | os.PathLike[str],
    goal_or_configs: Goal = "exact",
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    memory_budget_bytes: int | None = None,
    cache: bool = False,
    progress: Callable[[], None] | None = None,
    **options: Any,
) -> Any:
    """Load a model so that memory never holds more than the result and one tensor, optimise it, and return it.

    A `WeightOnlyConfig` among the configs, or a budget, rounds each weight as it is read: the result is that of
    `optimize(model, config)` bit for bit, and the original is never in memory. All other goals and configs are applied
    to what was read. With a `LargePagesConfig` among them files are read straight into large pages, and nothing is
    mapped. The model is in evaluation mode, and of the class that was saved.

    Args:
        name: a folder of safetensors, or the name of a model on the hub.
        goal_or_configs: as of `optimize`. Goals that choose bits ("fast", "memory") and configs that are fitted to text
            measure on the original, which is then loaded whole and given up as weights are replaced.
        dtype: of everything that is not packed; None: as stored.
        device: where the model is put; None: the CPU.
        memory_budget_bytes: of all weights, with the tensor at hand while they are read: the bits that lose least
            within it are chosen. It takes the place of a `WeightOnlyConfig`.
        cache: keep the packed model beside the folder or the hub's cache; the next call with the same files, config and
            versions maps it, and reads nothing else.
        progress: called after each tensor and each measurement. None: transformers' bar, then that of `optimize`.
        options: `draft_model` and `verify_on` of `optimize`; where the model is loaded whole, its `calibration`,
            `tokenizer` and `max_kl`, too.

    Raises:
        CheckpointError: a file is missing, damaged, truncated or of another format, or a tensor is missing, unknown or
            of another shape; nothing is half loaded.
        ConfigError: an argument does not exist or does not fit; or nothing fits the budget, and what would is stated.
        Others: as `optimize`.
    """
    rounding, rest = _divided(goal_or_configs)
    if memory_budget_bytes is not None and rounding is not None:
        raise ConfigError("memory_budget_bytes chooses the bits of weights; a WeightOnlyConfig names them. Give one.")
    if rounding is not None or memory_budget_bytes is not None:
        _check_options(options)
    request = Request(
        name=os.fspath(name),
        config=rounding,
        dtype=dtype_of(dtype),
        memory_budget_bytes=memory_budget_bytes,
        cache=cache,
        large_pages=_has_large_pages(rest),
        **({} if progress is None else {"advance": progress}),
    )
    loaded = source_of(request.name).read(request)
    model = loaded.model
    if loaded.applied:
        _check_options(options)
    if device is not None:
        with converting(ConfigError, f"The model cannot be put on the device {device!r}"):
            model = loaded.model = model.to(device)
    optimize(model, rest, originals="drop", progress=progress, **options)
    _tell(loaded, rounding)
    return model


def _divided(goal_or_configs: Goal) -> tuple[WeightOnlyConfig | None, Goal]:
    """Return how weights are rounded while they are read, if that is said, and what is done to the model then."""

    def is_rounding(config: Any) -> bool:
        return type(config) is WeightOnlyConfig

    if isinstance(goal_or_configs, Plan):
        found = [step.config for step in goal_or_configs.steps if is_rounding(step.config)]
        steps = [step for step in goal_or_configs.steps if not is_rounding(step.config)]
        rest: Goal = replace(goal_or_configs, steps=steps)
    elif isinstance(goal_or_configs, (str, Config)) or not isinstance(goal_or_configs, Sequence):
        found = [goal_or_configs] if is_rounding(goal_or_configs) else []  # type: ignore[list-item]
        rest = Plan.of([]) if found else goal_or_configs
    else:
        given: list[Any] = list(goal_or_configs)
        found = [config for config in given if is_rounding(config)]
        others = [config for config in given if not is_rounding(config)]
        rest = others[0] if len(others) == 1 and isinstance(others[0], str) else others or Plan.of([])
    if len(found) > 1:
        raise ConfigError("Weights are rounded by one WeightOnlyConfig; several were given.")
    return (found[0] if found else None), rest  # type: ignore[return-value]


def _has_large_pages(goal_or_configs: Goal) -> bool:
    if isinstance(goal_or_configs, Plan):
        return any(isinstance(step.config, LargePagesConfig) for step in goal_or_configs.steps)
    if isinstance(goal_or_configs, Sequence):
        return any(isinstance(config, LargePagesConfig) for config in goal_or_configs)
    return isinstance(goal_or_configs, LargePagesConfig)


def _check_options(options: dict[str, Any]) -> None:
    """Refuse text: what it would be measured against, or fitted to, is never in memory.

    Raises:
        ConfigError: there is some.
    """
    if given := [name for name in ("calibration", "max_kl") if options.get(name) is not None]:
        raise ConfigError(
            f"{given[0]} measures against the original, which is never in memory where weights are read in few bits. "
            "Leave it out, or load the model whole and call hf_accel.optimize(model, config, calibration=...)."
        )


def _tell(loaded: Loaded, rounding: WeightOnlyConfig | None) -> None:
    """Say in the report of the model what reading has done to it, and refuse to restore what was never there.

    rounding: the config by which weights were rounded, which stands in a list with a goal as it does without.
    """
    host = host_of(loaded.model)
    if host is None or not loaded.applied:
        return
    report = host.report
    now = report.patched_weight_bytes or report.weight_bytes
    if (more := report.addition) is not None:
        named = f'["{more.goal}", {rounding.written()}' if rounding is not None else f'["{more.goal}"'
        written = named + more.written.removeprefix(f'["{more.goal}"')
        report.addition = replace(more, written=f'"{more.goal}"' if written == f'["{more.goal}"]' else written)
    report.applied[:0] = loaded.applied
    report.skipped[:0] = loaded.skipped
    report.weight_bytes, report.patched_weight_bytes = loaded.weight_bytes or report.weight_bytes, now
    host.journal.refuse("its weights were read in few bits, and the originals were never in memory")
