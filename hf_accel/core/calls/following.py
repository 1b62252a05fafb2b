"""What passes after the prompt are given beside tokens and cache, where they take several tokens at once.

Drafts stand on the inputs of a step being those of its tokens one by one, put side by side. Where transformers' own
methods prepare inputs of the usual kind, they are. Elsewhere (models of images, whose positions have several axes, or
models with a method of their own) the model itself is asked, once per call: for the next token, for the one after it,
for both in one pass, and for the last that the call may take in. What does not fit together is decoded plainly. Cost
of asking: four times what stock's loop does at every token, some 200 µs; more where inputs change at some length,
which is looked for by halving.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import Cache

from hf_accel.core.calls.inputs import CONSTANT, LeanInputs
from hf_accel.core.drift import CACHE

OTHERWISE = "the model's inputs do not follow from those before"
# of verified steps every position's logits are wanted
ALL_LOGITS = {"logits_to_keep", "num_logits_to_keep"}
DATA = (torch.Tensor, Cache, dict, list, tuple, bool, int, float, str, type(None))


@dataclass(frozen=True)
class Following:
    """Inputs of the passes after a prompt of [B, S] tokens.

    mask: [B, S] of the prompt, to which ones are added; None: the model is given none. positions: of the next token of
    every row, [B], or [A, B] where positions have A axes; None: the model is not told any. same: what is the same at
    every step. repeated: what holds for a token, and the axis along which it is repeated for several. last: how many
    tokens a row may have in a pass with these inputs, None: as many as the call may come to.
    """

    mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    same: dict[str, Any] = field(default_factory=dict)
    repeated: dict[str, tuple[torch.Tensor, int]] = field(default_factory=dict)
    last: int | None = None

    def others(self, tokens: int) -> dict[str, Any]:
        """Return what a pass of so many tokens is given beside tokens, cache, mask and positions."""
        if not self.repeated:
            return self.same
        each = {name: one.repeat_interleave(tokens, dim=axis) for name, (one, axis) in self.repeated.items()}
        return {**self.same, **each}

    @property
    def kind(self) -> frozenset[str]:
        """What distinguishes these inputs from tokens with a mask and a position each."""
        given = {name for name, value in self.same.items() if value is not None} - CONSTANT | set(self.repeated)
        if self.positions is not None and self.positions.dim() > 1:
            given.add(f"{len(self.positions)} axes of positions")
        return frozenset(given)


def following(
    model: Any, model_kwargs: dict[str, Any], outputs: Any, input_ids: torch.Tensor, last: int
) -> Following | str:
    """Return the inputs that follow on a prompt [B, S] of these outputs, or why they do not.

    last: how many tokens a row has at most when a pass takes in its last one.
    """
    positions = model_kwargs.get("position_ids")
    if LeanInputs.fit(model, model_kwargs, outputs) and (positions is None or positions.dim() == 2):
        return Following(model_kwargs.get("attention_mask"), following_positions(model_kwargs, len(input_ids)))
    cache = model_kwargs.get(CACHE)
    if not isinstance(cache, Cache) or outputs.get(CACHE) is not cache or model_kwargs.get("use_cache") is not True:
        return OTHERWISE
    if model.is_remote_code() or not all(isinstance(value, DATA) for value in model_kwargs.values()):
        return OTHERWISE
    try:
        with _unchanged(model):
            asked = _Asked(model, model_kwargs, outputs, input_ids)
            first, second, both = asked.inputs(1, 1), asked.inputs(2, 1), asked.inputs(2, 2)
            far = max(2, last - input_ids.shape[1])
            at_end = second if far == 2 else asked.inputs(far, 1)
            found = _fitted(input_ids, first, second, both)
            if isinstance(found, str) or _fits(found, at_end, asked.ids(far), far):
                return found
            return replace(found, last=input_ids.shape[1] + _furthest(found, asked, far))
    except _Changed:
        return "preparing the model's inputs changes the model"
    except Exception:  # whatever a method of the model's own raises when it is asked ahead of time
        return OTHERWISE


def following_positions(model_kwargs: dict[str, Any], rows: int) -> torch.Tensor | None:
    """Return the position of every row's first new token, [B] or [A, B]; None where the model is not told positions."""
    positions = model_kwargs.get("position_ids")
    return None if positions is None else _of_rows(positions[..., -1], rows) + 1


def text_positions(model_kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Return positions [B, S] of the prompt as a model of text is told them; None where the model is told none."""
    positions = model_kwargs.get("position_ids")
    if positions is None or positions.dim() == 2:
        return positions
    mask = model_kwargs.get("attention_mask")
    if mask is None:
        return torch.arange(positions.shape[-1], device=positions.device)[None]
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def _of_rows(values: torch.Tensor, rows: int) -> torch.Tensor:
    return values.expand(*values.shape[:-1], rows)


class _Changed(Exception):
    """Preparing inputs left a trace."""


@contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    """Put back what the block changes of the model's attributes and of random numbers.

    Raises:
        _Changed: it did change some.
    """
    before, cuda = dict(vars(model)), [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        state = torch.get_rng_state()
        try:
            yield
        finally:
            now = vars(model)
            is_same = list(now) == list(before) and all(now[name] is before[name] for name in before)
            if not is_same:
                now.clear()
                now.update(before)
        if not is_same or not torch.equal(state, torch.get_rng_state()):
            raise _Changed


class _Asked:
    """The model's own methods, asked for the inputs of passes that are still to come."""

    def __init__(self, model: Any, model_kwargs: dict[str, Any], outputs: Any, input_ids: torch.Tensor) -> None:
        self.model, self.outputs, self.prompt = model, outputs, input_ids
        # copies of what is small: a method may write to what it is given
        self.kwargs = {
            name: value.clone() if isinstance(value, torch.Tensor) and not value.is_floating_point() else value
            for name, value in model_kwargs.items()
        }

    def ids(self, new: int) -> torch.Tensor:
        """Return the prompt with `new` further tokens, [B, S + new]: those it begins with."""
        columns = torch.arange(new, device=self.prompt.device) % self.prompt.shape[1]
        return torch.cat([self.prompt, self.prompt[:, columns]], dim=1)

    def inputs(self, new: int, tokens: int) -> dict[str, Any]:
        """Return the inputs of a pass over the last `tokens` of the `new` tokens that have followed the prompt."""
        kwargs = dict(self.kwargs)
        # one by one as in stock's loop, where they are few: of several at once, types are copied from the prompt
        steps = [1] * new if new <= 2 else [new]
        for count in steps:
            kwargs = self.model._update_model_kwargs_for_generation(
                self.outputs, kwargs, is_encoder_decoder=False, num_new_tokens=count
            )
        found: dict[str, Any] = self.model.prepare_inputs_for_generation(
            self.ids(new), next_sequence_length=tokens, **kwargs
        )
        return {name: value for name, value in found.items() if name not in ALL_LOGITS}


def _fitted(
    input_ids: torch.Tensor, first: dict[str, Any], second: dict[str, Any], both: dict[str, Any]
) -> Following | str:
    """Return what the inputs of two passes and of one in their place have in common, or why they have not."""
    rows, positions, mask = len(input_ids), first.get("position_ids"), first.get("attention_mask")
    if first.keys() != second.keys() or first.keys() != both.keys():
        return OTHERWISE
    if isinstance(positions, torch.Tensor):
        if positions.dim() not in (2, 3) or positions.shape[-1] != 1:
            return OTHERWISE
        positions = _of_rows(positions[..., 0], rows)
    elif positions is not None:
        return OTHERWISE
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.shape != (rows, input_ids.shape[1] + 1):
            return OTHERWISE
        mask = mask[:, :-1]
    found = Following(mask, positions)
    for name in first.keys() - {"input_ids", CACHE, "position_ids", "attention_mask"}:
        one, two, many = first[name], second[name], both[name]
        if _is_same(one, two) and _is_same(one, many):
            found.same[name] = one
        elif (axis := _token_axis(one, two, many)) is not None:
            found.repeated[name] = (one, axis)
        else:
            return OTHERWISE
    new = [torch.cat([input_ids, input_ids[:, :count]], dim=1) for count in (1, 2)]
    fit = _fits(found, first, new[0], 1) and _fits(found, second, new[1], 2) and _fits(found, both, new[1], 2, 2)
    return found if fit else OTHERWISE


def _fits(found: Following, inputs: dict[str, Any], ids: torch.Tensor, new: int, tokens: int = 1) -> bool:
    """Return whether inputs of a pass over the last `tokens` of ids [B, S + new] are those that follow."""
    own = {"input_ids", CACHE, "position_ids", "attention_mask"}
    others = found.others(tokens)
    if inputs.keys() - own != others.keys() or not isinstance(inputs.get(CACHE), Cache):
        return False
    mask, positions = None, None
    if found.mask is not None:
        mask = torch.cat([found.mask, found.mask.new_ones((len(ids), new))], dim=1)
    if found.positions is not None:
        steps = torch.arange(new - tokens, new, device=found.positions.device)
        positions = found.positions[..., None] + steps
    given = inputs.get("position_ids")
    if positions is not None and isinstance(given, torch.Tensor) and given.dim() == positions.dim():
        given = given.expand(positions.shape) if given.shape[-1] == tokens else given
    return (
        _is_same(inputs.get("input_ids"), ids[:, -tokens:])
        and _is_same(inputs.get("attention_mask"), mask)
        and _is_same(given, positions)
        and all(_is_same(inputs[name], value) for name, value in others.items())
    )


def _is_same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and bool(torch.equal(one, other))
    return type(one) is type(other) and isinstance(one, (bool, int, float, str)) and one == other


def _furthest(found: Following, asked: _Asked, beyond: int) -> int:
    """Return after how many new tokens a pass is the last that fits, where that after `beyond` does not."""
    fits = 2
    while fits + 1 < beyond:
        new = (fits + beyond) // 2
        if _fits(found, asked.inputs(new, 1), asked.ids(new), new):
            fits = new
        else:
            beyond = new
    return fits


def _token_axis(one: Any, two: Any, many: Any) -> int | None:
    """Return the axis along which `many` holds twice what `one` and `two` hold of a token; None: there is none."""
    if not all(isinstance(value, torch.Tensor) for value in (one, two, many)) or not _is_same(one, two):
        return None
    for axis in range(one.dim()):
        if one.shape[axis] == 1 and _is_same(one.repeat_interleave(2, dim=axis), many):
            return axis
    return None
