"""The inputs of one forward pass after the first, made with the least work that gives what stock would give.

Stock rebuilds all model inputs at every token (`_update_model_kwargs_for_generation`, then
`prepare_inputs_for_generation`), about 20 µs on a CPU. Where neither method is overridden and only arguments are
present whose growth is known, the same values follow from the previous step; everything else takes the stock route.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, GenerationMixin
from transformers.generation.utils import ALL_CACHE_NAMES

from hf_accel.core.drift import CACHE

GROWING = {"attention_mask", "position_ids"}
CONSTANT = {CACHE, "use_cache", "logits_to_keep"}
WITHOUT_ROWS = {"tokenizer", "assistant_tokenizer"}  # which `generate` hands on


def _is_stock(model: Any, name: str) -> bool:
    return getattr(getattr(model, name), "__func__", None) is getattr(GenerationMixin, name)


def has_stock_inputs(model: Any) -> bool:
    """Return whether transformers' own methods prepare the inputs of every forward pass of `model`."""
    names = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
    return not model.is_remote_code() and all(_is_stock(model, name) for name in names)


def _of_rows(inputs: dict[str, Any], index: torch.Tensor, rows: int) -> dict[str, Any]:
    """Return inputs of which mask [B, S] and positions [B, T] have these rows only; rows: B."""
    chosen = {
        name: value.index_select(0, index)
        for name in GROWING
        if isinstance(value := inputs.get(name), torch.Tensor) and value.shape[0] == rows
    }
    return inputs | chosen


def _further_axes(inputs: dict[str, Any]) -> str | None:
    is_plain = all(inputs[name].dim() == 2 for name in GROWING & set(inputs))
    return None if is_plain else "masks or positions of the model have further axes"


class StockInputs:
    """Inputs by the model's own methods: always right."""

    def __init__(self, model: Any, model_kwargs: dict[str, Any]) -> None:
        self.model = model
        self.model_kwargs = model_kwargs

    def next(self, outputs: Any, input_ids: torch.Tensor) -> dict[str, Any]:
        """Return the keyword arguments of the next forward; `input_ids` is everything so far, [B, S]."""
        self.absorb(outputs)
        length = 1 if self.model_kwargs["use_cache"] else None
        return self.model.prepare_inputs_for_generation(input_ids, next_sequence_length=length, **self.model_kwargs)

    def rows_stay(self) -> str | None:
        """Return why all rows have to stay, None if `keep_rows` may be called: nothing else has rows."""
        given = {name: value for name, value in self.model_kwargs.items() if value is not None}
        if not has_stock_inputs(self.model):
            return "the model's own methods prepare its inputs"
        if others := sorted(set(given) - GROWING - CONSTANT - WITHOUT_ROWS):
            return f"the model is given {', '.join(others)}"
        if self.cache is None and given.get("use_cache") is not False:
            return "the model keeps what it has read outside a cache"
        return _further_axes(given)

    def keep_rows(self, index: torch.Tensor, rows: int) -> None:
        """Let row b of the inputs be what row index[b] of `rows` was."""
        self.model_kwargs = _of_rows(self.model_kwargs, index, rows)

    def absorb(self, outputs: Any) -> None:
        """Take over what the forward pass returned, as stock does before the next one."""
        self.model_kwargs = self.model._update_model_kwargs_for_generation(
            outputs, self.model_kwargs, is_encoder_decoder=False
        )

    @property
    def cache(self) -> Any:
        return next((self.model_kwargs[name] for name in ALL_CACHE_NAMES if name in self.model_kwargs), None)


class LeanInputs:
    """The same inputs, grown from the previous step's."""

    def __init__(self, model_kwargs: dict[str, Any]) -> None:
        self.inputs = {name: value for name, value in model_kwargs.items() if value is not None}

    @staticmethod
    def fit(model: Any, model_kwargs: dict[str, Any], outputs: Any) -> bool:
        """Return whether the shorter way gives the same inputs as stock."""
        cache = model_kwargs.get(CACHE)
        given = {name for name, value in model_kwargs.items() if value is not None}
        return (
            isinstance(cache, Cache)
            and outputs.get(CACHE) is cache
            and not cache.is_compileable
            and model_kwargs.get("use_cache") is True
            and given <= GROWING | CONSTANT
            and has_stock_inputs(model)
            and all(model_kwargs[name].device == model.device for name in given & GROWING)
        )

    def next(self, outputs: Any, input_ids: torch.Tensor) -> dict[str, Any]:
        """Return the keyword arguments of the next forward; `input_ids` is everything so far, [B, S]."""
        self.absorb(outputs)
        inputs = dict(self.inputs)
        inputs["input_ids"] = input_ids[:, -1:].clone(memory_format=torch.contiguous_format)
        return inputs

    def rows_stay(self) -> str | None:
        """Return why all rows have to stay, None if `keep_rows` may be called."""
        return _further_axes(self.inputs)

    def keep_rows(self, index: torch.Tensor, rows: int) -> None:
        """Let row b of the inputs be what row index[b] of `rows` was."""
        self.inputs = _of_rows(self.inputs, index, rows)

    def absorb(self, outputs: Any, tokens: int = 1) -> None:
        """Grow positions and mask by the tokens, one per forward, that the next one takes in as the last of."""
        positions, mask = self.inputs.get("position_ids"), self.inputs.get("attention_mask")
        if positions is not None:
            self.inputs["position_ids"] = positions[..., -1:] + tokens
        if mask is not None:
            self.inputs["attention_mask"] = torch.cat([mask, mask.new_ones((mask.shape[0], tokens))], dim=-1)

    @property
    def cache(self) -> Any:
        return self.inputs[CACHE]
