"""The forms of a model's decoder layers: near the beginning of a text and far from it, where both are the same."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_accel.core.model.discovery.bounds import within_bounds
from hf_accel.core.model.discovery.forms import BlockForm
from hf_accel.core.model.discovery.layer import described_layer
from hf_accel.core.model.discovery.listening import Recorded, listen
from hf_accel.core.model.discovery.readings import Unexplained
from hf_accel.core.model.shadow import twin

Found = dict[str, BlockForm | str]  # by the path of a layer: its form, or why there is none
Forms = dict[str, tuple[Any, BlockForm | str]]  # the same, with what the layer was made of
_LENGTH = re.compile("position|seq_len|n_ctx")


def forms_of(model: PreTrainedModel, known: Forms) -> tuple[dict[str, BlockForm], tuple[str, ...], str]:
    """Return the forms of the layers that are understood by path, sentences on others, and why there is none at all.

    known: what was found before, and is added to.
    """
    taken = {path: form for path, (parts, form) in known.items() if parts == _parts(model, path)}
    if not known or len(taken) < len(known):
        try:
            taken = _discover(model)
        except Exception as error:  # whatever foreign forwards raise
            return {}, (), f"its decoder cannot be run by itself ({_said(error)}), so its layers run as they are"
        known |= {path: (_parts(model, path), form) for path, form in taken.items()}
    found = {path: form for path, form in taken.items() if isinstance(form, BlockForm)}
    odd = {path: form for path, form in taken.items() if isinstance(form, str)}
    if not found:
        first = next(iter(odd.values()), "it has no list of layers")
        return (
            {},
            (),
            f"no decoder layer of this {type(model).__name__} is understood, so they run as they are: {first}",
        )
    return found, tuple(f"{path} runs as it is: {reason}" for path, reason in odd.items()), ""


def _discover(model: PreTrainedModel) -> Found:
    copy = twin(model)
    near = _described(copy, 0)
    if not any(isinstance(form, BlockForm) for form in near.values()):
        return near
    for start in _far(model):
        try:
            with within_bounds():
                far = _described(copy, start)
        except (IndexError, TypeError, RuntimeError):  # it has no such positions, or takes none
            continue
        for path, form in near.items():
            if isinstance(form, BlockForm) and far.get(path) != form:
                near[path] = f"it computes something else from position {start} on"
        return near
    return near


def _described(model: Any, start: int) -> Found:
    paths = {id(module): path for path, module in model.named_modules()}
    dtype = model.dtype
    found: Found = {}

    def use(record: Recorded) -> None:
        path = paths[id(record.layer)]
        try:
            found[path] = described_layer(record, dtype)
        except Unexplained as reason:
            found[path] = str(reason)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            found[path] = f"it is in no known form ({_said(error)})"

    listen(model, use, start)
    return found


def _far(model: PreTrainedModel) -> list[int]:
    """Return positions far from the beginning: beyond all lengths that its config names, and near the end of them."""
    lengths = [length for length in _lengths(model.config.to_dict()) if length > 64]
    return [2 * max(lengths), max(lengths) - 64] if lengths else []


def _lengths(config: dict[str, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _lengths(value)
        elif type(value) is int and _LENGTH.search(str(name)):
            yield value


def _parts(model: nn.Module, path: str) -> Any:
    """Return what a layer is made of: the kinds of its modules, and the sizes of their tensors."""
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        return None
    return [
        (name, type(module) if name else None, [tuple(t.shape) for t in module._parameters.values() if t is not None])
        for name, module in layer.named_modules()
    ]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
