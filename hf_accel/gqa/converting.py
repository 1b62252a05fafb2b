"""Converts every attention layer of a model to fewer key and value heads, one after the other.

The layers are converted on what they read in the original model: each depends on no other, and the text is read as
often as their inputs need portions of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_accel.core.model.modes import evaluating
from hf_accel.errors import UnsupportedModelError
from hf_accel.gqa.alignment import Seen, aligned, pooled
from hf_accel.gqa.config import GQAConfig
from hf_accel.gqa.grouping import Groups, neighbours
from hf_accel.gqa.heads import AttentionLayer, Heads, layers_of, read_heads, write_heads
from hf_accel.gqa.layouts import layout_of, out_in
from hf_accel.gqa.maps import found_maps
from hf_accel.gqa.repair import Errors, Task, repair
from hf_accel.gqa.running import Read, RecordedCall, Runnable, recorded
from hf_accel.gqa.sensitivity import key_costs
from hf_accel.ops.tolerances import of_text_logits

BATCH = 2  # rows read together
MOST_BYTES = 1 << 30  # of inputs kept at a time
KEPT_BACK = 8  # one row in so many is not fitted to, and decides what is better


@dataclass(frozen=True)
class Converted:
    """One layer: its new projections, which query heads share, and its output's errors, where text was read."""

    heads: Heads
    groups: Groups
    errors: Errors | None = None


def convert_into(
    new: Any, model: Any, config: GQAConfig, ids: Tensor | None, advance: Callable[[], None] = lambda: None
) -> list[Converted]:
    """Fill the projections of `new`, a `reshaped_model` of `model`, and return what was made of each layer.

    model: the original, which is left as it is. ids [N, T]: calibration text as `text_for` gives it; None for the
    methods that need none.

    Raises:
        ConfigError: the text tells too little of a layer.
        UnsupportedModelError: attention cannot be run by itself, or does what is not known here.
    """
    layers, targets = layers_of(model), layers_of(new)
    found = []
    if ids is None:
        for layer, target in zip(layers, targets, strict=True):
            read_from = read_heads(layer, model.config)
            _check_finite(layer.path, read_from)
            heads = pooled(read_from, config.num_kv_heads, config.method)
            write_heads(target, new.config, heads)
            found.append(Converted(heads, neighbours(layer.heads, config.num_kv_heads)))
            advance()
        return found
    each = ids.numel() * model.config.hidden_size * model.dtype.itemsize
    with evaluating(model):
        for portion in _portions(len(layers), max(1, MOST_BYTES // each)):
            read = recorded(model, layers[portion], ids, BATCH)
            for layer, target in zip(layers[portion], targets[portion], strict=True):
                runnable = Runnable(target, new.config)
                made = _converted(Runnable(layer, model.config), runnable, read.pop(layer.path), config, advance)
                write_heads(target, new.config, made.heads)
                found.append(made)
    return found


def least_tokens(layers: Sequence[AttentionLayer], config: Any) -> int:
    """Return how many tokens the least squares of the layers' output projections need: one for each of its inputs."""
    outputs = [layer.module.get_submodule(layout_of(layer.module, config).o) for layer in layers]
    return max(out_in(output).shape[1] for output in outputs)


def kept_back(rows: int) -> int:
    """Return how many batches of so many rows are not fitted to."""
    return max(1, rows // (KEPT_BACK * BATCH))


def _portions(count: int, most: int) -> Iterator[slice]:
    for first in range(0, count, most):
        yield slice(first, min(count, first + most))


def _converted(
    original: Runnable, target: Runnable, read: Read, config: GQAConfig, advance: Callable[[], None]
) -> Converted:
    rows = read.rows
    heads = original.heads()
    _check_finite(original.path, heads)
    _check_alone(original, read.call)
    maps = found_maps(original, read.call, heads, original.config)
    costs = key_costs(original, read.call, heads, maps)
    moment, targets = _seen(original, read.call, rows)
    seen = Seen(moment, costs)
    made, groups = aligned(heads, config.num_kv_heads, seen, maps, is_fixed=bool(original.layer.fixed))
    target.write(made)
    task = Task(target, read.call, rows, targets, BATCH, kept_back(len(rows)))
    errors = repair(task, config.repair_steps, advance)
    return Converted(target.heads(), groups, errors)


def _check_finite(path: str, heads: Heads) -> None:
    if not all(bool(part.isfinite().all()) for part in vars(heads).values() if part is not None):
        raise UnsupportedModelError(f"The projections of {path} hold NaN or infinite numbers; they are not converted.")


def _check_alone(original: Runnable, call: RecordedCall) -> None:
    """Raise unless an attention module computes by itself what it computed in its model, and numbers at all."""
    expected = call.outputs
    if expected is None:
        return
    if not bool(expected.isfinite().all()):
        raise UnsupportedModelError(
            f"{original.path} gives NaN or infinite numbers on the calibration text. Look for such weights in the "
            "model, or give other text."
        )
    with torch.no_grad():
        found = original.run(call, call.inputs)
    if not float((found - expected).norm()) <= of_text_logits(expected.dtype) * float(expected.norm()):
        raise UnsupportedModelError(
            f"{original.path} computes something else by itself than in its model; its heads are not converted."
        )


@torch.no_grad()
def _seen(original: Runnable, call: RecordedCall, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the second moment [E + 1, E + 1] of what a layer reads, with a one, and its outputs [N, T, E]."""
    width = rows.shape[2] + 1
    moment = torch.zeros(width, width, dtype=torch.float64, device=rows.device)
    outputs = []
    for inputs in rows.split(BATCH):
        outputs.append(original.run(call, inputs))
        flat = inputs.flatten(0, 1).double()
        flat = torch.cat([flat, torch.ones_like(flat[:, :1])], 1)
        moment += flat.mT @ flat
    return moment.cpu() / (rows.shape[0] * rows.shape[1]), torch.cat(outputs)
